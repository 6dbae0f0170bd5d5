// How a linear layer's work is cut on the CPU: a unit is one panel of 64 outputs, or two, times a block of rows.
#pragma once
#include <algorithm>

#include "base/parallel.h"
#include "gemm/kernels_cpu.h"

namespace specrt {

constexpr int kRowBlock = 48;          // most rows of a block: their partial sums take 12 KB
constexpr int64_t kCache = 512 << 10;  // half an L2 cache
static_assert(kRowBlock % kMaxRows == 0);

// fn(panel, first row, rows) for every unit; `width` outputs are a panel here. Blocks are about the same size, and a multiple of what a kernel takes. Where all of x fits the L2 cache a panel passes all rows
// before the next one comes, so that W is read from memory once. Where it does not, a block of rows stays and the panels pass: they prefetch themselves, x does not.
template <typename F> void for_each_block(int64_t outputs, int64_t width, int64_t rows, int64_t columns, int64_t element_bytes, F&& fn) {
  const int64_t even = (rows + (rows + kRowBlock - 1) / kRowBlock - 1) / ((rows + kRowBlock - 1) / kRowBlock), size = (even + kMaxRows - 1) / kMaxRows * kMaxRows;
  const int64_t panels = (outputs + width - 1) / width, blocks = (rows + size - 1) / size;
  const bool x_stays = rows * columns * element_bytes <= kCache;
  parallel_for(panels * blocks, rows * columns * outputs, [&](int64_t i) {
    const int64_t panel = x_stays ? i / blocks : i % panels, row = (x_stays ? i % blocks : i / panels) * size;
    fn(panel, row, static_cast<int>(std::min<int64_t>(size, rows - row)));
  });
}

}  // namespace specrt

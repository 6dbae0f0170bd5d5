// Linear on the CPU. The unit of work is one panel of 64 outputs times a block of rows; it walks k in chunks that fit the L1 cache, and inside a
// chunk takes a few rows at a time with their 64 outputs each in registers: outputs lie in the lanes, so no sum ever crosses lanes and the chain
// of an output is the same in every blocking. Partial sums rest in fp32 between chunks, which loses nothing.
#include <algorithm>
#include <cstring>

#include "base/parallel.h"
#include "gemm/blocks_cpu.h"
#include "gemm/choose_cpu.h"
#include "gemm/finish_cpu.h"
#include "gemm/kernels_cpu.h"

namespace specrt {
namespace {

constexpr int kChunk = 64;  // steps of k in a chunk: 16 KB of weights

template <typename T> constexpr int kPair = sizeof(T) == 4 ? 1 : 2;  // elements of x a step of k consumes

template <typename T> void pack(const PackLinearParams& p) {
  constexpr int g = kPair<T>;
  const int64_t steps = (p.in_features + g - 1) / g, panels = (p.out_features + kPanel - 1) / kPanel;
  parallel_for(panels, panels * steps * kPanel * g, [&](int64_t panel) {
    T* to = static_cast<T*>(p.packed) + panel * steps * kPanel * g;
    const int outputs = std::min<int64_t>(kPanel, p.out_features - panel * kPanel);
    std::memset(to, 0, steps * kPanel * g * sizeof(T));
    for (int o = 0; o < outputs; ++o) {
      const T* from = static_cast<const T*>(p.weight) + (panel * kPanel + o) * p.in_features;
      for (int k = 0; k < p.in_features; ++k) to[(static_cast<int64_t>(k / g) * kPanel + o) * g + k % g] = from[k];
    }
  });
}

// The sums of rows [row, row + count) of one panel: acc [count, 64].
template <typename T> void panel_sums(const LinearParams& p, const StepKernels& kernels, int64_t panel, int64_t row, int count, float* acc) {
  constexpr int g = kPair<T>;
  const int64_t whole = p.in_features / g, steps = (p.in_features + g - 1) / g;
  const T* x = static_cast<const T*>(p.x) + row * p.in_features;
  const char* weight = static_cast<const char*>(p.weight) + panel * steps * kStepBytes;
  std::memset(acc, 0, sizeof(float) * kPanel * count);
  const int passes = (count + kMaxRows - 1) / kMaxRows;
  for (int64_t k = 0; k < whole; k += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, whole - k));
    const char* chunk = weight + k * kStepBytes;
    // The passes over this chunk share the prefetch of the next one, which may be the next panel's (the last prefetches past the end are harmless).
    Prefetch next{chunk + n * kStepBytes, (4 + passes - 1) / passes};
    for (int r = 0; r < count; r += kMaxRows) {
      const int m = std::min(kMaxRows, count - r);
      kernels.rows[m - 1](x + r * static_cast<int64_t>(p.in_features) + k * g, p.in_features * sizeof(T), chunk, n, acc + r * kPanel, next);
      next.from += static_cast<int64_t>(n) * next.lines * 64;
    }
  }
  if (whole < steps) {  // odd K in bfloat16: the last element with a zero beside it
    for (int r = 0; r < count; ++r) {
      T last[g] = {x[r * static_cast<int64_t>(p.in_features) + p.in_features - 1]};
      kernels.rows[0](last, 0, weight + whole * kStepBytes, 1, acc + r * kPanel, {weight, 0});
    }
  }
}

template <typename T, typename Out> void linear(const LinearParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  if (n <= 0) return;
  const StepKernels& kernels = step_kernels(p.dtype);
  const auto scales = row_scales(p, n);
  for_each_block(p.out_features, kPanel, n, p.in_features, sizeof(T), [&](int64_t panel, int64_t row, int count) {
    alignas(64) float acc[kRowBlock * kPanel];
    panel_sums<T>(p, kernels, panel, row, count, acc);
    for (int r = 0; r < count; ++r) finish_row<T, Out, T>(p, scales.get(), row + r, panel, acc + r * kPanel);
  });
}

// kChoose: two panels are a block of the choice.
template <typename T> void linear_choice(const LinearParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  if (n <= 0) return;
  const StepKernels& kernels = step_kernels(p.dtype);
  const RowBounds bounds(n);
  for_each_block(p.out_features, kLseBlock, n, p.in_features, sizeof(T), [&](int64_t block, int64_t row, int count) {
    alignas(64) float acc[2][kRowBlock * kPanel];
    const int outputs = static_cast<int>(std::min<int64_t>(kLseBlock, p.out_features - block * kLseBlock));
    for (int half = 0; half * kPanel < outputs; ++half) panel_sums<T>(p, kernels, 2 * block + half, row, count, acc[half]);
    for (int r = 0; r < count; ++r) {
      float z[kLseBlock];
      for (int half = 0; half < 2; ++half) std::copy_n(acc[half] + r * kPanel, std::clamp(outputs - half * kPanel, 0, kPanel), z + half * kPanel);
      choose_row(p, bounds, row + r, block, z, outputs);
    }
  });
}

}  // namespace

void launch_pack_linear_cpu(const PackLinearParams& p) {
  if (p.dtype == DType::kF32) pack<float>(p);
  else if (p.dtype == DType::kBF16) pack<bf16>(p);
  else pack<e4m3>(p);
}

void launch_linear_cpu(const LinearParams& p) {
  if (p.finish == Finish::kChoose) p.dtype == DType::kF32 ? linear_choice<float>(p) : linear_choice<bf16>(p);
  else if (p.dtype == DType::kF32) linear<float, float>(p);
  else if (p.out_dtype == DType::kF32) linear<bf16, float>(p);
  else linear<bf16, bf16>(p);
}

}  // namespace specrt

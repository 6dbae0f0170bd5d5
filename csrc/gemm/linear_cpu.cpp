// Linear on the CPU. The unit of work is one panel of 64 outputs times a block of rows; it walks k in chunks that fit the L1 cache, and inside a
// chunk takes a few rows at a time with their 64 outputs each in registers: outputs lie in the lanes, so no sum ever crosses lanes and the chain
// of an output is the same in every blocking. Partial sums rest in fp32 between chunks, which loses nothing.
#include <algorithm>
#include <cstring>

#include "base/math.h"
#include "base/parallel.h"
#include "gemm/blocks_cpu.h"
#include "gemm/kernels_cpu.h"
#include "gemm/params.h"

namespace specrt {
namespace {

static_assert(kPanel == kSquareBlock, "a panel makes one block of a row's sums of squares");

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

// out = round(acc + bias) for `outputs` <= 64 of one row.
template <typename T, typename Out> SPECRT_CLONES void store_row(const float* acc, const T* bias, Out* out, int outputs) {
  if (bias)
    for (int o = 0; o < outputs; ++o) out[o] = round_to<Out>(acc[o] + to_float(bias[o]));
  else
    for (int o = 0; o < outputs; ++o) out[o] = round_to<Out>(acc[o]);
}

// y: `outputs` / 2 rounded gates and ups, in eights by turns.
template <typename T> SPECRT_CLONES void silu_row(const T* y, T* out, int outputs) {
  for (int i = 0; i < outputs; i += 16)
    for (int e = 0; e < 8; ++e) {
      const float g = to_float(y[i + e]);
      const float s = to_float(round_to<T>(g / (1.0f + exp_rn(-g))));
      out[i / 2 + e] = round_to<T>(s * to_float(y[i + 8 + e]));
    }
}

// y: what is added to the residual stream.
template <typename T> SPECRT_CLONES void residual_row(const T* y, const T* residual, T* h, const T* weight, T* scaled, int outputs) {
  for (int o = 0; o < outputs; ++o) h[o] = round_to<T>(to_float(residual[o]) + to_float(y[o]));
  if (weight)
    for (int o = 0; o < outputs; ++o) scaled[o] = round_to<T>(to_float(h[o]) * to_float(weight[o]));
}

// What follows the sums of one row and panel (params.h, Finish).
template <typename T, typename Out> void finish_row(const LinearParams& p, int64_t row, int64_t panel, float* acc) {
  const int64_t first = panel * kPanel, at = row * p.out_features + first;
  const int outputs = static_cast<int>(std::min<int64_t>(kPanel, p.out_features - first));
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + first : nullptr;
  if (p.squares) {
    const float r = row_scale(p.squares + row * square_pitch(p.in_features), p.in_features, p.eps);
    for (int o = 0; o < outputs; ++o) acc[o] = acc[o] * r;
  }
  if (p.finish == Finish::kStore) return store_row(acc, bias, static_cast<Out*>(p.out) + at, outputs);
  T y[kPanel];
  store_row(acc, bias, y, outputs);
  if (p.finish == Finish::kSilu) return silu_row(y, static_cast<T*>(p.out) + at / 2, outputs);
  T* h = static_cast<T*>(p.residual_out) + at;
  residual_row(y, static_cast<const T*>(p.residual) + at, h, p.next_weight ? static_cast<const T*>(p.next_weight) + first : nullptr,
               p.next_weight ? static_cast<T*>(p.scaled) + at : nullptr, outputs);
  if (p.next_weight) p.next_squares[row * square_pitch(p.out_features) + panel] = block_squares(h, outputs);
}

// Rows [row, row + count) of one panel.
template <typename T, typename Out> void panel_block(const LinearParams& p, const StepKernels& kernels, int64_t panel, int64_t row, int count) {
  constexpr int g = kPair<T>;
  const int64_t whole = p.in_features / g, steps = (p.in_features + g - 1) / g;
  const T* x = static_cast<const T*>(p.x) + row * p.in_features;
  const char* weight = static_cast<const char*>(p.weight) + panel * steps * kStepBytes;
  alignas(64) float acc[kRowBlock * kPanel];
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
  for (int r = 0; r < count; ++r) finish_row<T, Out>(p, row + r, panel, acc + r * kPanel);
}

template <typename T, typename Out> void linear(const LinearParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  if (n <= 0) return;
  const StepKernels& kernels = step_kernels(p.dtype);
  for_each_block(p.out_features, n, p.in_features, sizeof(T), [&](int64_t panel, int64_t row, int count) { panel_block<T, Out>(p, kernels, panel, row, count); });
}

}  // namespace

void launch_pack_linear_cpu(const PackLinearParams& p) {
  if (p.dtype == DType::kF32) pack<float>(p);
  else if (p.dtype == DType::kBF16) pack<bf16>(p);
  else pack<e4m3>(p);
}

void launch_linear_cpu(const LinearParams& p) {
  if (p.dtype == DType::kF32) linear<float, float>(p);
  else if (p.out_dtype == DType::kF32) linear<bf16, float>(p);
  else linear<bf16, bf16>(p);
}

}  // namespace specrt

// What follows the sums of one row and panel of 64 outputs (params.h, Finish) on the CPU.
#pragma once
#include <algorithm>
#include <memory>

#include "base/math.h"
#include "base/parallel.h"
#include "gemm/params.h"

namespace specrt {

static_assert(kPanel == kSquareBlock, "a panel makes one block of a row's sums of squares");

// out = round(acc + bias) for `outputs` <= 64 of one row.
template <typename Bias, typename Out> SPECRT_CLONES void store_row(const float* acc, const Bias* bias, Out* out, int outputs) {
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

template <typename T> SPECRT_CLONES float squares_row(const T* h, int outputs) { return block_squares(h, outputs); }

// 1 / rms of the first n rows, where a deferred norm asks for it; else null.
inline std::unique_ptr<float[]> row_scales(const LinearParams& p, int64_t n) {
  if (!p.squares) return nullptr;
  std::unique_ptr<float[]> scales(new float[n]);
  for (int64_t r = 0; r < n; ++r) scales[r] = row_scale(p.squares + r * square_pitch(p.in_features), p.in_features, p.eps);
  return scales;
}

// T: of the residual stream and SiLU-mul. Out: of kStore. scales: row_scales.
template <typename T, typename Out, typename Bias> void finish_row(const LinearParams& p, const float* scales, int64_t row, int64_t panel, float* acc) {
  const int64_t first = panel * kPanel, at = row * p.out_features + first;
  const int outputs = static_cast<int>(std::min<int64_t>(kPanel, p.out_features - first));
  const Bias* bias = p.bias ? static_cast<const Bias*>(p.bias) + first : nullptr;
  if (scales)
    for (int o = 0; o < outputs; ++o) acc[o] = acc[o] * scales[row];
  if (p.finish == Finish::kStore) return store_row(acc, bias, static_cast<Out*>(p.out) + at, outputs);
  T y[kPanel];
  store_row(acc, bias, y, outputs);
  if (p.finish == Finish::kSilu) return silu_row(y, static_cast<T*>(p.out) + at / 2, outputs);
  T* h = static_cast<T*>(p.residual_out) + at;
  residual_row(y, static_cast<const T*>(p.residual) + at, h, p.next_weight ? static_cast<const T*>(p.next_weight) + first : nullptr,
               p.next_weight ? static_cast<T*>(p.scaled) + at : nullptr, outputs);
  if (p.next_weight) p.next_squares[row * square_pitch(p.out_features) + panel] = squares_row(h, outputs);
}

}  // namespace specrt

// 128 columns of a row to e4m3, by a warp, four columns a lane (params.h, QuantizeFp8Params): for the kernel of its own and for linear_fp8, which takes few rows as they are.
#pragma once
#include "gemm/params.h"
#include "gemm/tile.cuh"
#include "ptx/convert.cuh"

namespace specrt {

struct QuantizedFour {
  uint32_t values;  // four e4m3
  float scale;      // the same in all lanes
};

// Quotients are IEEE's, as base/fp8.h has them. Where no step on the way can be denormal they are made as the compiler makes them (reciprocal, a Newton step, a correction), but without
// a branch for each and with one reciprocal for all. A value so small that its remainder is denormal has a quotient far below what e4m3 can tell from zero.
template <typename T> __device__ __forceinline__ QuantizedFour quantize_four(const Packed<T>& x) {
  float value[4], quotient[4], scale;
  uint32_t greatest = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    value[e] = to_float(x.each[e]);
    greatest = max(greatest, float_to_bits(value[e]) & 0x7fffffffu);
  }
  greatest = __reduce_max_sync(0xffffffffu, greatest);
  const float most = bits_to_float(greatest);
  if (__builtin_expect(most > 0x1p-50f && most < 0x1p50f, true)) {
    constexpr float kPart = 1.0f / kMaxE4m3;
    const float near = most * kPart;
    scale = fma_rn(fma_rn(-kMaxE4m3, near, most), kPart, near);
    const float about = ptx::rcp(scale), inverse = fma_rn(about, fma_rn(-scale, about, 1.0f), about);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float near = value[e] * inverse;
      quotient[e] = copysignf(fma_rn(fma_rn(-scale, near, value[e]), inverse, near), value[e]);  // the sign: of -0 the correction makes 0
    }
  } else {
    scale = scale_of(greatest);
#pragma unroll
    for (int e = 0; e < 4; ++e) quotient[e] = value[e] / scale;
  }
  return {ptx::pack_e4m3(quotient[0], quotient[1]) | ptx::pack_e4m3(quotient[2], quotient[3]) << 16, scale};
}

}  // namespace specrt

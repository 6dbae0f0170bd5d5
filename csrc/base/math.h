// exp2, exp, log in float32, written out with explicit fma so that they give the same bits on the host, on the device and in
// every vector width. The sampler uses them on both backends: its CPU and CUDA results are equal to the bit.
#pragma once
#include "base/types.h"

namespace specrt {

SPECRT_HD float fma_rn(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

SPECRT_HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
SPECRT_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// c ? a : b on the bits: both sides are computed, so that loops stay vectorisable (a compiler may sink one side into a branch).
SPECRT_HD float select(bool c, float a, float b) {
  uint32_t mask = 0u - static_cast<uint32_t>(c);
  return bits_to_float((float_to_bits(a) & mask) | (float_to_bits(b) & ~mask));
}

constexpr float kLog2e = 1.44269504088896340736f;

// 2^f on [-1/2, 1/2] by the Taylor series of e^(f ln 2) to degree 7 (truncation 2e-9).
SPECRT_HD float exp2_fraction(float f) {
  float p = 1.5252734e-5f;
  p = fma_rn(p, f, 1.5403530e-4f);
  p = fma_rn(p, f, 1.3333558e-3f);
  p = fma_rn(p, f, 9.6181291e-3f);
  p = fma_rn(p, f, 5.5504109e-2f);
  p = fma_rn(p, f, 2.4022651e-1f);
  p = fma_rn(p, f, 6.9314718e-1f);
  return fma_rn(p, f, 1.0f);
}

constexpr float kRoundsToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the sum's lowest bits are

// 2^x, about 1 ulp on [-126, 127]; below -126 exactly 0 (so exp2_rn(-inf) == 0), above 127.999 the value at 127.999; NaN stays NaN.
SPECRT_HD float exp2_rn(float x) {
  float c = x < -126.0f ? -126.0f : x;
  c = c > 127.999f ? 127.999f : c;
  float n = (c + kRoundsToInteger) - kRoundsToInteger;
  float p = exp2_fraction(c - n);
  int32_t e = static_cast<int32_t>(n);
  // n = 128 cannot occur (127.999 - 128 < 0 keeps p < 1 but needs 2^128): split the scale in two.
  float lo = bits_to_float(static_cast<uint32_t>((e >> 1) + 127) << 23);
  float hi = bits_to_float(static_cast<uint32_t>((e - (e >> 1)) + 127) << 23);
  float r = (p * lo) * hi;
  r = x < -126.0f ? 0.0f : r;
  return x != x ? x : r;
}

SPECRT_HD float exp_rn(float x) { return exp2_rn(x * kLog2e); }

// log(1 + f) + e log 2 for 1 + f in [sqrt(1/2), sqrt(2)): the degree-8 polynomial of Cephes' logf.
SPECRT_HD float log_reduced(float f, float e) {
  float z = f * f;
  float p = 7.0376836292e-2f;
  p = fma_rn(p, f, -1.1514610310e-1f);
  p = fma_rn(p, f, 1.1676998740e-1f);
  p = fma_rn(p, f, -1.2420140846e-1f);
  p = fma_rn(p, f, 1.4249322787e-1f);
  p = fma_rn(p, f, -1.6668057665e-1f);
  p = fma_rn(p, f, 2.0000714765e-1f);
  p = fma_rn(p, f, -2.4999993993e-1f);
  p = fma_rn(p, f, 3.3333331174e-1f);
  float y = (f * z) * p;
  y = fma_rn(e, -2.12194440e-4f, y);
  y = fma_rn(-0.5f, z, y);
  float r = f + y;
  return fma_rn(e, 0.693359375f, r);
}

// A positive normal x = (1 + f) 2^e with 1 + f in [sqrt(1/2), sqrt(2)).
SPECRT_HD void log_split(float x, float& f, float& e) {
  uint32_t u = float_to_bits(x);
  uint32_t shifted = u + (0x3f800000u - 0x3f3504f3u);  // carries into the exponent from sqrt(1/2) up
  e = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  f = bits_to_float((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
}

// Natural logarithm of a normal float, about 1 ulp. (log(0) = -inf, log(+inf) = +inf, negative or NaN -> NaN.)
SPECRT_HD float log_rn(float x) {
  float f, e, inf = bits_to_float(0x7f800000u);
  log_split(x, f, e);
  float r = log_reduced(f, e);
  r = select(x == inf, inf, r);
  r = select(x == 0.0f, -inf, r);
  return select(x >= 0.0f, r, bits_to_float(0x7fc00000u));
}

// log(1 + x) for x in [-1, sqrt(2) - 1): where 1 + x needs no reduction, x itself is the exact argument, so nothing is lost to the rounding of 1 + x.
// (log1p(-1) = -inf.)
SPECRT_HD float log1p_rn(float x) {
  float f, e;
  log_split(1.0f + x, f, e);
  float r = log_reduced(select(e == 0.0f, x, f), e);
  return select(x == -1.0f, bits_to_float(0xff800000u), r);
}

}  // namespace specrt

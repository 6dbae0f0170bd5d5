// FP8 e4m3 ("fn": bias 7, no infinities, NaN 0x7f and 0xff, largest value 448), the same bits on host and device.
#pragma once
#include "base/math.h"

namespace specrt {

struct e4m3 {
  uint8_t bits;
};

constexpr float kMaxE4m3 = 448.0f;
constexpr int kScaleBlock = 128;  // columns that share an activation's scale

// Exact. The bits, moved to float32's places, are the value times 2^-120 (denormals too); NaN stays NaN.
SPECRT_HD float to_float(e4m3 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fu) << 20, sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  const float value = bits_to_float(magnitude) * bits_to_float((127u + 120u) << 23);
  return bits_to_float((magnitude == 0x07f00000u ? 0x7fc00000u : float_to_bits(value)) | sign);
}

// Rounded to nearest even, saturated to +-448; NaN gives 0x7f. Below 2^-6 the step is 2^-9, which is the last place of 2^14: adding that rounds.
SPECRT_HD e4m3 to_e4m3(float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000u;
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  uint32_t rounded = magnitude < 0x3c800000u ? small : normal;
  rounded = magnitude >= 0x43e00000u ? 0x7eu : rounded;
  const uint32_t out = magnitude > 0x7f800000u ? 0x7fu : rounded | ((bits >> 24) & 0x80u);
  return e4m3{static_cast<uint8_t>(out)};
}

// The scale of values whose greatest |x| has these bits (of a float32, the sign cleared: NaN is greater than all numbers): max / 448, or 1 where that would
// not be a normal number, so that such values, zeros mostly, become zeros. NaN gives the one NaN 0x7fc00000.
SPECRT_HD float scale_of(uint32_t max_bits) {
  if (max_bits > 0x7f800000u) return bits_to_float(0x7fc00000u);
  const float scale = bits_to_float(max_bits) / kMaxE4m3;
  return scale < 1.17549435e-38f ? 1.0f : scale;
}

}  // namespace specrt

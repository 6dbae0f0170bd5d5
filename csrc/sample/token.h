// What happens to one token, shared by both backends; the passes over a row are in row_cpu.h and block.cuh.
#pragma once
#include "base/noise.h"
#include "sample/params.h"

namespace specrt {

constexpr int kLseBlock = 128;

SPECRT_HD float infinity() { return bits_to_float(0x7f800000u); }
SPECRT_HD bool finite_bits(uint32_t u) { return (u & 0x7f800000u) != 0x7f800000u; }
// One NaN, so that the backends agree on its bits.
SPECRT_HD float canonical(float x) { return x != x ? bits_to_float(0x7fc00000u) : x; }

// An unsigned key in the order of the floats; -0 equals +0, NaN is the lowest.
SPECRT_HD uint32_t order_key(float x) {
  uint32_t u = float_to_bits(x + 0.0f);
  uint32_t key = (u >> 31) ? ~u : u | 0x80000000u;
  return x != x ? 0u : key;
}
SPECRT_HD float key_value(uint32_t key) { return bits_to_float((key >> 31) ? key & 0x7fffffffu : ~key); }

// (value, token) pairs are ordered by value descending, then token ascending: one unsigned 64-bit order, in which a larger rank is better.
// 0 is "no token": -inf and NaN are never chosen.
SPECRT_HD uint64_t rank_of(float value, int32_t token) {
  return value > -infinity() ? (static_cast<uint64_t>(order_key(value)) << 32) | static_cast<uint32_t>(~token) : 0;
}
SPECRT_HD int32_t rank_token(uint64_t rank) { return rank ? static_cast<int32_t>(~static_cast<uint32_t>(rank)) : -1; }

// The four noise words of tokens 4c .. 4c + 3.
SPECRT_HD void noise_words(int64_t seed, int32_t position, int32_t purpose, int c, uint32_t words[4]) {
  philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), static_cast<uint32_t>(c),
             static_cast<uint32_t>(position), static_cast<uint32_t>(purpose), 0u, words);
}

// Repetition as Hugging Face (divide a positive logit, multiply a negative one), then frequency and presence as OpenAI: each step rounded.
SPECRT_HD float penalize(float z, int32_t count, bool in_prompt, const float* f) {
  const float repeated = select(z > 0.0f, z / f[kRepetition], z * f[kRepetition]);
  z = select((count > 0) | in_prompt, repeated, z);
  z = z - f[kFrequency] * static_cast<float>(count);
  return z - select(count > 0, f[kPresence], 0.0f);
}

// The probability of z relative to the row's maximum, as an integer: sums of it have no order. exp_rn(z - max) * 2^40 truncated: between 2^-86 and 1 its powers of
// two only move the exponent, so that they are added to it at once, and below there is nothing left.
SPECRT_HD int64_t mass(float z, float max) {
  float x = (z - max) * kLog2e;
  x = x > -86.0f ? x : -86.0f;
  const float shifted = x + kRoundsToInteger, p = exp2_fraction(x - (shifted - kRoundsToInteger));
  return static_cast<int64_t>(bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23) + (40u << 23)));
}

// The mass a top-p set must reach, of `total`.
SPECRT_HD int64_t needed_mass(float top_p, int64_t total) {
  const double product = static_cast<double>(top_p) * static_cast<double>(total);
  int64_t need = static_cast<int64_t>(product);
  need += static_cast<double>(need) < product ? 1 : 0;
  return need < 1 ? 1 : need > total ? total : need;
}

}  // namespace specrt

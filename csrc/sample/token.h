// What happens to one token, shared by both backends; the passes over a row are in row_cpu.h and block.cuh.
#pragma once
#include "base/choice.h"
#include "sample/params.h"

namespace specrt {

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

// What a head's z (transformed, so divided by the temperature T) and the target's own noise G say of the target's choice: it is token i with probability
// softmax(h), h = T (kHeadSlope z + G). A head is trained to be right on average, and so is flatter than the target, whose logits are about 1.2 times its own;
// and it errs in logits, so that T weighs the error as it weighs the noise. By maximum likelihood over what SmolLM2-135M chose and its EAGLE-3 head drafted at
// depths 1 to 6, h = 1.19 z + 1.03 G at T = 1 and T (1.25 z + 0.97 G) at T = 0.6; the slope is 1.1 to 1.3 both where the head knows nearly all and where it knows
// little, and a network that also sees depth, rank and entropy finds no better order. A draft model errs otherwise: a slope of 1 is best for nearly perfect ones.
constexpr float kHeadSlope = 1.2f;

}  // namespace specrt

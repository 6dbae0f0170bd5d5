// The public noise of sampling: Philox4x32-10 (Salmon et al., SC'11) as a function of (seed, position, purpose, token), and the Gumbel variables
// and coins made of its words. Host and device give the same bits (csrc/README.md, 7).
#pragma once
#include "base/math.h"

namespace specrt {

// Independent streams of one request's seed (specrt/ops.py).
enum Purpose : int32_t { kNoiseShared = 0, kNoiseDraft = 1, kNoiseAccept = 2, kNoiseResidual = 3 };

// One round, and the key's step after it.
SPECRT_HD void philox_round(uint32_t key0, uint32_t key1, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
  c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
  c1 = static_cast<uint32_t>(b);
  c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
  c3 = static_cast<uint32_t>(a);
}
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// The four words of counter (c0, c1, c2, c3) under key (key0, key1).
SPECRT_HD void philox4x32(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t out[4]) {
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) philox_round(key0 + round * kPhiloxWeyl0, key1 + round * kPhiloxWeyl1, c0, c1, c2, c3);
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// G = -log(E), E = -log1p(-W), W = (word + 1/2) 2^-32. Small E are the winners and keep their full relative precision down to 2^-33, so G < kGumbelMax;
// W rounding to 1 gives -inf, which never wins. (U = 1 - W near 1 would round to 1 and give +inf: verification.md 6.)
SPECRT_HD float gumbel(uint32_t word) {
  const float w = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;
  return -log_rn(-log1p_rn(-w));
}
constexpr float kGumbelMax = 22.8740f;  // above -log(-log1p(-2^-33))

SPECRT_HD uint32_t noise_word(int64_t seed, int32_t position, int32_t index, int32_t purpose) {
  uint32_t out[4];
  philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), static_cast<uint32_t>(index) >> 2,
             static_cast<uint32_t>(position), static_cast<uint32_t>(purpose), 0u, out);
  const uint32_t low = (index & 1) ? out[1] : out[0], high = (index & 1) ? out[3] : out[2];
  return (index & 2) ? high : low;
}

// The Gumbel variable of `token` at absolute position `position` (of the token being chosen).
SPECRT_HD float gumbel_noise(int64_t seed, int32_t position, int32_t token, int32_t purpose) {
  return gumbel(noise_word(seed, position, token, purpose));
}

// A coin in [0, 1), a multiple of 2^-24: exact in float32, never 1.
SPECRT_HD float uniform(int64_t seed, int32_t position, int32_t index, int32_t purpose) {
  return static_cast<float>(noise_word(seed, position, index, purpose) >> 8) * 5.9604644775390625e-8f;
}

}  // namespace specrt

// How one token of a vocabulary is chosen, and the statistics of its logits: what the sampler (sample/) and lm_head's epilogue (gemm/) have in common, and so cannot differ in
// (csrc/README.md, 6 and 7).
#pragma once
#include "base/noise.h"

namespace specrt {

// Columns of the per-slot tables (specrt/ops.py).
enum SamplingF { kTemperature, kTopP, kMinP, kRepetition, kPresence, kFrequency, kSamplingF };  // [B, 6]
enum SamplingI { kTopK, kMinTokens, kPromptLen, kHasBias, kHasPenalty, kSamplingI };            // [B, 5]
enum RowStatus : int32_t { kStatusOk, kStatusNotFinite, kStatusAllMasked };

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
constexpr uint64_t kBadRank = ~uint64_t{0};  // above every rank: some logit is not finite

// The four noise words of tokens 4c .. 4c + 3.
SPECRT_HD void noise_words(int64_t seed, int32_t position, int32_t purpose, int c, uint32_t words[4]) {
  philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), static_cast<uint32_t>(c),
             static_cast<uint32_t>(position), static_cast<uint32_t>(purpose), 0u, words);
}

#ifdef __CUDACC__
// Division by one number, IEEE: by its reciprocal and two corrections where neither operand is extreme, as the compiler does it, but for what is the same for all.
struct Divide {
  float by, reciprocal;
  bool plain;

  __device__ explicit Divide(float by) : by(by), reciprocal(1.0f / by), plain(by > 0x1p-30f && by < 0x1p30f) {}

  __device__ void operator()(float (&x)[4]) const {
    const float low = fminf(fminf(fabsf(x[0]), fabsf(x[1])), fminf(fabsf(x[2]), fabsf(x[3]))), high = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
    if (plain && low > 0x1p-60f && high < 0x1p60f) {
#pragma unroll
      for (float& value : x) {
        float q = value * reciprocal;
        q = fma_rn(fma_rn(-q, by, value), reciprocal, q);
        value = fma_rn(fma_rn(-q, by, value), reciprocal, q);
      }
    } else {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {  // no index that is not a constant: x stays in registers
        const float y = (e < 2 ? (e == 0 ? x[0] : x[1]) : (e == 2 ? x[2] : x[3])) / by;
        e < 2 ? (e == 0 ? x[0] = y : x[1] = y) : (e == 2 ? x[2] = y : x[3] = y);
      }
    }
  }
};

// Scores below `bound` cannot win, so most noise is never made: G < kGumbelMax; and since E = -log1p(-W) >= W, a score reaches the bound only where W <= exp(z - bound), up to roundings
// that the slack of noise_reach covers many times.
__device__ __forceinline__ float noise_reach(float bound) { return bound - (0.01f + fabsf(bound) * 1e-6f); }
__device__ __forceinline__ bool word_reaches(uint32_t word, float z, float reach) { return !(static_cast<float>(word) * 2.3283064365386963e-10f > __expf(z - reach)); }
#endif

// What a row's choice needs of kLseBlock tokens. z: the logit, divided by the temperature where there is one.
struct alignas(16) BlockChoice {
  uint64_t rank;  // of the best z + G, or 0 where no token of the block can be the row's choice; kBadRank if some logit is not finite
  float z;        // of that token
  float max;      // the highest z
};

// The parameters of a row's choice. position: of the token to be chosen.
struct alignas(16) RowChoice {
  float temperature;
  int32_t position;
  int64_t seed;
};

}  // namespace specrt

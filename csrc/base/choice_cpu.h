// Passes over some logits of a row on the CPU. Everything is inlined into the SPECRT_CLONES function that calls it, so that it is compiled for its vector width;
// loops run over fixed lanes because the compiler may not reorder a float maximum by itself.
#pragma once
#include <algorithm>

#include "base/choice.h"
#include "base/parallel.h"

namespace specrt {

#define SPECRT_ROW inline __attribute__((always_inline))

constexpr int kLanes = 64;

SPECRT_ROW bool all_finite(const float* x, int n) {
  uint32_t worst = 0;
  for (int i = 0; i < n; ++i) worst = std::max(worst, float_to_bits(x[i]) & 0x7fffffffu);
  return worst < 0x7f800000u;
}

// Maximum of n values; NaN is ignored, -inf if there is none.
SPECRT_ROW float max_of(const float* x, int n) {
  float lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = -infinity();
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  for (int l = 0; i + l < n; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  for (int d = kLanes / 2; d; d >>= 1)
    for (int l = 0; l < d; ++l) lane[l] = lane[l + d] > lane[l] ? lane[l + d] : lane[l];
  return lane[0];
}

struct Best {
  float score = -infinity();
  int32_t token = -1;
};

// The best of x[0..n), the tokens being first, first + 1, ...
SPECRT_ROW Best argmax_of(const float* x, int n, int32_t first) {
  constexpr int block = 256;
  Best best;
  int at = -1;
  for (int i = 0; i < n; i += block) {
    float m = max_of(x + i, std::min(block, n - i));
    if (m > best.score) best.score = m, at = i;
  }
  if (at < 0) return best;
  while (x[at] != best.score) ++at;
  best.token = first + at;
  return best;
}

// The noise words of tokens first .. first + tokens - 1 (first a multiple of 4): philox4x32 with the counters as lanes.
constexpr int kNoiseBlock = 256;
template <int tokens> SPECRT_ROW void noise_block(int64_t seed, int32_t position, int32_t purpose, int32_t first, uint32_t* words) {
  constexpr int counters = tokens / 4;
  uint32_t c[4][counters];
  for (int l = 0; l < counters; ++l) {
    c[0][l] = (static_cast<uint32_t>(first) >> 2) + static_cast<uint32_t>(l);
    c[1][l] = static_cast<uint32_t>(position);
    c[2][l] = static_cast<uint32_t>(purpose);
    c[3][l] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int l = 0; l < counters; ++l) philox_round(key0, key1, c[0][l], c[1][l], c[2][l], c[3][l]);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  for (int l = 0; l < counters; ++l) {
    words[4 * l] = c[0][l];
    words[4 * l + 1] = c[1][l];
    words[4 * l + 2] = c[2][l];
    words[4 * l + 3] = c[3][l];
  }
}

// z + G of one block of at most `tokens`; the tail is -inf.
template <int tokens = kNoiseBlock> SPECRT_ROW void score_block(const float* z, int n, int64_t seed, int32_t position, int32_t purpose, int32_t first, float* score) {
  uint32_t words[tokens];
  noise_block<tokens>(seed, position, purpose, first, words);
  for (int l = 0; l < n; ++l) score[l] = z[l];
  for (int l = n; l < tokens; ++l) score[l] = -infinity();
  for (int l = 0; l < tokens; ++l) score[l] = score[l] + gumbel(words[l]);
}

// Statistics of one block of at most 128 tokens (the order in params.h).
SPECRT_ROW void lse_block(const float* z, int n, float* max, float* sum) {
  float e[kLseBlock], lane[32];
  const float m = max_of(z, n);
  *max = m;
  *sum = 0.0f;
  if (!(m > -infinity())) return;
  for (int i = 0; i < n; ++i) e[i] = exp_rn(z[i] - m);
  for (int i = n; i < kLseBlock; ++i) e[i] = 0.0f;
  for (int l = 0; l < 32; ++l) lane[l] = ((e[4 * l] + e[4 * l + 1]) + e[4 * l + 2]) + e[4 * l + 3];
  for (int d = 16; d; d >>= 1)
    for (int l = 0; l < d; ++l) lane[l] = lane[l] + lane[l + d];
  *sum = lane[0];
}

}  // namespace specrt

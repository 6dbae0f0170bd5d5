// Passes over a row on the CPU, beyond those of base/choice_cpu.h.
#pragma once
#include <vector>

#include "base/choice_cpu.h"
#include "sample/token.h"

namespace specrt {

constexpr int kChunk = 16384;  // tokens of a row that one thread takes; a multiple of every block size

// The best of z + G. A block whose best logit cannot win even with the largest noise is skipped: an equal score would lose to the lower id.
SPECRT_ROW Best exact_of(const float* z, int n, int64_t seed, int32_t position, int32_t purpose, int32_t first) {
  Best best;
  float score[kNoiseBlock];
  for (int i = 0; i < n; i += kNoiseBlock) {
    const int m = std::min(kNoiseBlock, n - i);
    if (!(max_of(z + i, m) + kGumbelMax > best.score)) continue;
    score_block(z + i, m, seed, position, purpose, first + i, score);
    const Best b = argmax_of(score, m, first + i);
    if (b.score > best.score) best = b;
  }
  return best;
}

// What sample_transform does to a row after the penalties; the columns of a row's slot.
struct Adjustments {
  const float* f;           // of sampling_f
  const int32_t* i;         // of sampling_i
  const float* bias;        // [V]
  const int32_t* stop_ids;  // [stops]
  const int32_t* mask;      // [ceil(V/32)] or null
  int stops;
  int32_t position;         // of the token to be chosen
};
RowStatus adjust_row(float* z, int n, const Adjustments& a);

// Log-sum-exp of rows [0, n) of z, n * V worth of work over all threads.
void rows_lse(const float* z, int64_t n, int vocab, float* lse);

// Ranks (token.h) of a set of tokens that contains the k best of x[0..n), in no order; -inf and NaN are no values.
std::vector<uint64_t> top_candidates(const float* x, int n, int k);

// z + G of rows [0, n) of z [n, V], in place; as they are where there is no noise. positions: of the tokens to be chosen.
void perturb_rows(float* z, int64_t n, int vocab, const int32_t* request, const int32_t* positions, const int64_t* seeds, const float* sampling_f, int noise);

// The k best columns of each row of x [n, columns] and, where `score` is not null, their log-softmax; -1 and -inf where fewer are possible.
void best_columns(const float* x, int64_t n, int columns, int k, int32_t* column, float* score);

// Tokens of the k highest values of x[0..n), ties by lower id, best first: their ranks, at most k.
std::vector<uint64_t> top_ranks(const float* x, int n, int k);

}  // namespace specrt

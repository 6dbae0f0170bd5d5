// What follows the sums of one row and 128 outputs of lm_head where nobody wants its logits (params.h, Finish::kChoose) on the CPU.
#pragma once
#include <atomic>
#include <memory>

#include "base/choice_cpu.h"
#include "gemm/params.h"

namespace specrt {

// A score that some block of each row has reached: a block that cannot reach it need not make its noise. A thread may overwrite a better one: then less is skipped.
class RowBounds {
 public:
  explicit RowBounds(int64_t rows) : bound_(new std::atomic<float>[rows]) {
    for (int64_t r = 0; r < rows; ++r) bound_[r].store(-infinity(), std::memory_order_relaxed);
  }
  bool reached(int64_t row, float highest) const { return highest + kGumbelMax >= bound_[row].load(std::memory_order_relaxed); }
  void raise(int64_t row, float score) const {
    if (score > bound_[row].load(std::memory_order_relaxed)) bound_[row].store(score, std::memory_order_relaxed);
  }

 private:
  std::unique_ptr<std::atomic<float>[]> bound_;
};

// z: the row's n logits from `first` on. `noisy`: whether the block may have the row's best score, of z's maximum.
template <typename Noisy> SPECRT_ROW BlockChoice choice_of(float* z, int n, int32_t first, const RowChoice& how, float* sum, Noisy&& noisy) {
  if (!all_finite(z, n)) return {kBadRank, -infinity(), -infinity()};
  if (how.temperature > 0.0f && how.temperature != 1.0f)
    for (int i = 0; i < n; ++i) z[i] = z[i] / how.temperature;
  Best best;
  float max;
  if (!(how.temperature > 0.0f)) {
    best = argmax_of(z, n, first);
    max = best.score;
  } else if (max = max_of(z, n); noisy(max)) {
    float score[kLseBlock];
    score_block<kLseBlock>(z, n, how.seed, how.position, kNoiseShared, first, score);
    best = argmax_of(score, kLseBlock, first);
  }
  if (sum) lse_block(z, n, &max, sum);
  return {best.token < 0 ? 0 : rank_of(best.score, best.token), best.token < 0 ? -infinity() : z[best.token - first], max};
}

SPECRT_CLONES inline void choose_row(const LinearParams& p, const RowBounds& bounds, int64_t row, int64_t block, float* z, int n) {
  const int64_t at = row * ((p.out_features + kLseBlock - 1) / kLseBlock) + block;
  const BlockChoice choice = choice_of(z, n, static_cast<int32_t>(block * kLseBlock), row_choice(p, row), p.sums ? p.sums + at : nullptr,
                                       [&](float max) { return bounds.reached(row, max); });
  bounds.raise(row, choice.rank && choice.rank != kBadRank ? key_value(static_cast<uint32_t>(choice.rank >> 32)) : -infinity());
  p.choice[at] = choice;
}

}  // namespace specrt

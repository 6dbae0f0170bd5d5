// sample_blocks: one row a thread.
#include "sample/row_cpu.h"

namespace specrt {
namespace {

SPECRT_CLONES void sample_row(const SampleBlocksParams& p, int64_t row) {
  const BlockChoice* choice = p.choice + row * p.blocks;
  BlockChoice best{0, -infinity(), -infinity()};
  float max = -infinity();
  for (int j = 0; j < p.blocks; ++j) {
    if (choice[j].rank > best.rank) best = choice[j];
    max = choice[j].max > max ? choice[j].max : max;
  }
  const RowStatus status = best.rank == kBadRank || max == infinity() ? kStatusNotFinite : !(max > -infinity()) ? kStatusAllMasked : kStatusOk;
  p.status[row] = status;
  p.token[row] = status == kStatusOk ? std::max(rank_token(best.rank), 0) : 0;
  if (!p.logprob) return;
  float sum = 0.0f;
  for (int j = 0; j < p.blocks; ++j) sum = sum + p.sums[row * p.blocks + j] * exp_rn(choice[j].max - max);
  p.logprob[row] = status == kStatusOk ? canonical(best.z - canonical(max + log_rn(sum))) : -infinity();
}

}  // namespace

void launch_sample_blocks_cpu(const SampleBlocksParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  parallel_for(n, n * p.blocks * 16, [&](int64_t row) { sample_row(p, row); });
}

}  // namespace specrt

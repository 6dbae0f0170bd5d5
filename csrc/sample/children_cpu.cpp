// draft_children: a row is laid out over the target's tokens, and from there on is one of sample_transform and draft_topk.
#include "sample/row_cpu.h"

namespace specrt {
namespace {

SPECRT_CLONES bool row_finite(const float* z, int n) { return all_finite(z, n); }

// The row over the target's tokens, transformed; nothing but -inf if it is not finite.
void spread_row(const DraftChildrenParams& p, int64_t row, float* z) {
  const float* own = p.logits + row * p.columns;
  const int count = p.ids ? p.columns : std::min(p.columns, p.vocab);
  std::fill(z, z + p.vocab, -infinity());
  if (!row_finite(own, count)) return;
  for (int i = 0; i < count; ++i) {
    const int64_t v = p.ids ? p.ids[i] : i;
    if (v >= 0 && v < p.vocab) z[v] = own[i];
  }
  const int64_t b = p.row_request[row];
  const Adjustments a{p.sampling_f + b * kSamplingF, p.sampling_i + b * kSamplingI, p.bias + b * p.vocab, p.stop_ids + b * p.stops, nullptr, p.stops,
                      p.row_position[row] + p.ahead};
  if (adjust_row(z, p.vocab, a) == kStatusNotFinite) std::fill(z, z + p.vocab, -infinity());
}

}  // namespace

void launch_draft_children_cpu(const DraftChildrenParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  thread_local std::vector<float> spread;  // kept, not allocated anew for each level
  spread.resize(n * p.vocab);
  float* z = spread.data();  // of this thread, whichever takes a row
  parallel_for(n, n * p.vocab * 8, [&](int64_t row) { spread_row(p, row, z + row * p.vocab); });
  std::vector<int32_t> before(n);  // of the token to be chosen, as draft_topk counts
  for (int64_t row = 0; row < n; ++row) before[row] = p.row_position[row] + p.ahead - 1;
  launch_draft_topk_cpu({z, p.row_request, before.data(), p.seeds, p.sampling_f, p.num_rows, z, p.token, p.score, p.noise, p.rows, p.vocab, p.k});
}

}  // namespace specrt

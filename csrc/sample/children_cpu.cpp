// draft_children: a row is laid out over the target's tokens for the filters and the noise, which are the target's; its statistics and its best are those of the drafter's own columns.
#include "sample/row_cpu.h"

namespace specrt {
namespace {

SPECRT_CLONES bool row_finite(const float* z, int n) { return all_finite(z, n); }

int64_t token_of(const DraftChildrenParams& p, int column) { return p.ids ? p.ids[column] : column; }

// Nothing but -inf is left where a product is infinite.
SPECRT_CLONES void multiply(float* x, int n, float by) {
  for (int i = 0; i < n; ++i) x[i] = x[i] * by;
  if (!(max_of(x, n) < infinity())) std::fill(x, x + n, -infinity());
}

float temperature_of(const DraftChildrenParams& p, int64_t row) { return p.sampling_f[p.row_request[row] * kSamplingF + kTemperature]; }

// The row over the target's tokens, transformed; nothing but -inf if it is not finite.
void spread_row(const DraftChildrenParams& p, int64_t row, int used, float* z) {
  const float* own = p.own(row);
  std::fill(z, z + p.vocab, -infinity());
  if (!row_finite(own, used)) return;
  for (int i = 0; i < used; ++i) z[token_of(p, i)] = own[i];
  const int64_t b = p.row_request[row];
  const Adjustments a{p.sampling_f + b * kSamplingF, p.sampling_i + b * kSamplingI, p.bias + b * p.vocab, p.stop_ids + b * p.stops, nullptr, p.stops,
                      p.row_position[row] + p.ahead};
  if (adjust_row(z, p.vocab, a) == kStatusNotFinite) std::fill(z, z + p.vocab, -infinity());
  if (p.foretells(temperature_of(p, row))) multiply(z, p.vocab, kHeadSlope);
}

}  // namespace

void launch_draft_children_cpu(const DraftChildrenParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  const int used = static_cast<int>(p.ids ? std::lower_bound(p.ids, p.ids + p.columns, p.vocab) - p.ids : std::min(p.columns, p.vocab));  // columns that are tokens of the target's
  thread_local std::vector<float> spread, packed;  // kept, not allocated anew for each level
  spread.resize(n * p.vocab);
  packed.resize(n * p.columns);
  float *z = spread.data(), *own = packed.data();  // of this thread, whichever takes a row
  parallel_for(n, n * p.vocab * 8, [&](int64_t row) { spread_row(p, row, used, z + row * p.vocab); });
  std::vector<int32_t> positions(n);
  for (int64_t row = 0; row < n; ++row) positions[row] = p.row_position[row] + p.ahead;
  perturb_rows(z, n, p.vocab, p.row_request, positions.data(), p.seeds, p.sampling_f, p.noise);
  parallel_for(n, n * p.columns * 4, [&](int64_t row) {
    for (int i = 0; i < p.columns; ++i) own[row * p.columns + i] = i < used ? z[row * p.vocab + token_of(p, i)] : -infinity();
    if (p.foretells(temperature_of(p, row))) multiply(own + row * p.columns, p.columns, temperature_of(p, row));
  });
  best_columns(own, n, p.columns, p.k, p.token, p.score);
  for (int64_t i = 0; i < n * p.k; ++i)
    if (p.token[i] >= 0) p.token[i] = static_cast<int32_t>(token_of(p, p.token[i]));
}

}  // namespace specrt

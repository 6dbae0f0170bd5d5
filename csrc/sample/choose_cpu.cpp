// sample_exact, row_logprobs, draft_topk. A row is cut in chunks, so that a few rows use every thread; the choice is a maximum, so the cut
// leaves no trace.
#include "sample/row_cpu.h"

namespace specrt {
namespace {

SPECRT_CLONES Best greedy_chunk(const float* z, int n, int32_t first) { return argmax_of(z, n, first); }

SPECRT_CLONES Best exact_chunk(const float* z, int n, int64_t seed, int32_t position, int32_t first) {
  return exact_of(z, n, seed, position, kNoiseShared, first);
}

SPECRT_CLONES void perturb_chunk(const float* z, int n, int64_t seed, int32_t position, int32_t purpose, int32_t first, float* out) {
  float score[kNoiseBlock];
  for (int i = 0; i < n; i += kNoiseBlock) {
    const int m = std::min(kNoiseBlock, n - i);
    score_block(z + i, m, seed, position, purpose, first + i, score);
    std::copy(score, score + m, out + i);
  }
}

}  // namespace

void launch_sample_exact_cpu(const SampleExactParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), chunks = (p.vocab + kChunk - 1) / kChunk;
  std::vector<Best> best(n * chunks);
  parallel_for(n * chunks, n * p.vocab * 32, [&](int64_t task) {
    const int64_t row = task / chunks, b = p.row_request[row];
    const int32_t first = static_cast<int32_t>(task % chunks * kChunk);
    const int size = std::min(kChunk, p.vocab - first);
    const float* z = p.z + row * p.vocab + first;
    best[task] = p.sampling_f[b * kSamplingF + kTemperature] > 0.0f ? exact_chunk(z, size, p.seeds[b], p.row_position[row] + 1, first)
                                                                   : greedy_chunk(z, size, first);
  });
  for (int64_t row = 0; row < n; ++row) {
    Best winner;
    for (int64_t c = 0; c < chunks; ++c)
      if (best[row * chunks + c].score > winner.score) winner = best[row * chunks + c];
    p.token[row] = std::max(winner.token, 0);
  }
}

void launch_row_logprobs_cpu(const RowLogprobsParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  rows_lse(p.z, n, p.vocab, p.lse);
  parallel_for(n, p.top ? n * p.vocab * 4 : 0, [&](int64_t row) {
    const float* z = p.z + row * p.vocab;
    const int32_t token = p.token[row];
    const bool possible = token >= 0 && token < p.vocab && p.lse[row] != -infinity();
    p.logprob[row] = possible ? canonical(z[token] - p.lse[row]) : -infinity();
    if (p.top == 0) return;
    const std::vector<uint64_t> top = top_ranks(z, p.vocab, p.top);
    for (int i = 0; i < p.top; ++i) {
      const int32_t v = i < static_cast<int>(top.size()) ? rank_token(top[i]) : -1;
      p.top_token[row * p.top + i] = v;
      p.top_logprob[row * p.top + i] = v >= 0 ? canonical(z[v] - p.lse[row]) : -infinity();
    }
  });
}

void perturb_rows(float* z, int64_t n, int vocab, const int32_t* request, const int32_t* positions, const int64_t* seeds, const float* sampling_f, int noise) {
  if (noise < 0) return;
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  parallel_for(n * chunks, n * vocab * 32, [&](int64_t task) {
    const int64_t row = task / chunks, b = request[row];
    if (!(sampling_f[b * kSamplingF + kTemperature] > 0.0f)) return;
    const int32_t first = static_cast<int32_t>(task % chunks * kChunk);
    float* part = z + row * vocab + first;
    perturb_chunk(part, std::min(kChunk, vocab - first), seeds[b], positions[row], noise, first, part);
  });
}

void best_columns(const float* x, int64_t n, int columns, int k, int32_t* column, float* score) {
  std::vector<float> lse(n);
  if (score) rows_lse(x, n, columns, lse.data());
  parallel_for(n, n * columns * 4, [&](int64_t row) {
    const float* own = x + row * columns;
    const std::vector<uint64_t> top = top_ranks(own, columns, k);
    for (int i = 0; i < k; ++i) {
      const int32_t c = i < static_cast<int>(top.size()) ? rank_token(top[i]) : -1;
      column[row * k + i] = c;
      if (score) score[row * k + i] = c >= 0 ? canonical(own[c] - lse[row]) : -infinity();
    }
  });
}

void launch_draft_topk_cpu(const DraftTopkParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows);
  std::copy(p.z, p.z + n * p.vocab, p.perturbed);
  std::vector<int32_t> positions(n);
  for (int64_t row = 0; row < n; ++row) positions[row] = p.row_position[row] + 1;
  perturb_rows(p.perturbed, n, p.vocab, p.row_request, positions.data(), p.seeds, p.sampling_f, p.noise);
  best_columns(p.perturbed, n, p.vocab, p.k, p.token, p.score);
}

}  // namespace specrt

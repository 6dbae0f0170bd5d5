#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/math.h"
#include "base/parallel.h"
#include "base/squares.h"
#include "norm/params.h"

namespace specrt {
namespace {

template <typename T>
SPECRT_CLONES void rms_norm_row(const T* x, const T* weight, T* out, float eps, int hidden) {
  float lane[kNormLanes] = {}, folded[kNormLanes / 2];
  for (int i = 0; i < hidden; i += kNormLanes) {
    const int n = std::min(kNormLanes, hidden - i);
    for (int l = 0; l < n; ++l) lane[l] = fma_rn(to_float(x[i + l]), to_float(x[i + l]), lane[l]);
  }
  int n = 1;
  while (n < hidden && n < kNormLanes) n *= 2;  // lanes past a short row are zero: leaving them out changes no bit
  for (n /= 2; n; n /= 2) {
    for (int l = 0; l < n; ++l) folded[l] = lane[2 * l] + lane[2 * l + 1];
    std::copy(folded, folded + n, lane);
  }
  float r = 1.0f / std::sqrt(lane[0] / static_cast<float>(hidden) + eps);
  for (int j = 0; j < hidden; ++j) out[j] = round_to<T>(to_float(round_to<T>(to_float(x[j]) * r)) * to_float(weight[j]));
}

template <typename T> void rms_norm(const RmsNormParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), h = p.hidden;
  parallel_for(n, n * h * 8, [&](int64_t r) {
    rms_norm_row(static_cast<const T*>(p.x) + r * h, static_cast<const T*>(p.weight), static_cast<T*>(p.out) + r * h, p.eps, p.hidden);
  });
}

template <typename T> void embedding(const EmbeddingParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), h = p.hidden;
  const T* weight = static_cast<const T*>(p.weight);
  parallel_for(n, n * h * 4, [&](int64_t r) {
    T *out = static_cast<T*>(p.out) + r * h, *scaled = static_cast<T*>(p.scaled) + r * h;
    const int32_t id = p.ids[r];
    if (id >= 0 && id < p.vocab) std::memcpy(out, static_cast<const T*>(p.table) + id * h, h * sizeof(T));
    else std::fill(out, out + h, round_to<T>(bits_to_float(0x7fc00000u)));
    for (int64_t i = 0; i < h; ++i) scaled[i] = round_to<T>(to_float(out[i]) * to_float(weight[i]));
    for (int b = 0; b < square_blocks(p.hidden); ++b)
      p.squares[r * square_pitch(p.hidden) + b] = block_squares(out + b * kSquareBlock, std::min(kSquareBlock, p.hidden - b * kSquareBlock));
  });
}

// Row `from` of [count, hidden], NaN if there is none; after its norm where there is a weight.
template <typename T> void copy_row(const void* table, int64_t from, int64_t count, const void* weight, float eps, int hidden, T* out) {
  const T* x = static_cast<const T*>(table) + from * hidden;
  if (from < 0 || from >= count) std::fill(out, out + hidden, round_to<T>(bits_to_float(0x7fc00000u)));
  else if (weight) rms_norm_row(x, static_cast<const T*>(weight), out, eps, hidden);
  else std::copy(x, x + hidden, out);
}

template <typename T> void head_input(const HeadInputParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), h = p.hidden;
  parallel_for(n, n * h * 16, [&](int64_t r) {
    T *first = static_cast<T*>(p.joined) + 2 * r * h, *second = first + h;
    const int64_t from = p.parent ? p.parent[r] : r;
    copy_row(p.table, p.ids[r], p.vocab, p.token_weight, p.eps, p.hidden, p.feature_first ? second : first);
    copy_row(p.feature, from, p.features, p.feature_weight, p.eps, p.hidden, p.feature_first ? first : second);
    if (p.stream) copy_row(p.feature, from, p.features, p.stream_normed ? p.feature_weight : nullptr, p.eps, p.hidden, static_cast<T*>(p.stream) + r * h);
  });
}

template <typename T> void join_rows(const JoinRowsParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), h = p.hidden;
  parallel_for(n, n * h * p.count * 8, [&](int64_t r) {
    const int64_t from = p.source ? p.source[r] : r;
    const bool missing = from == -1 && p.missing;
    for (int part = 0; part < p.count; ++part) {
      const T* table = missing ? static_cast<const T*>(p.missing) + part * h : static_cast<const T*>(p.parts[part]);
      copy_row(table, missing ? 0 : from, missing ? 1 : p.features, p.weights[part], p.eps, p.hidden, static_cast<T*>(p.out) + (r * p.count + part) * h);
    }
  });
}

template <typename T> void keep_rows(const KeepRowsParams& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), h = p.hidden;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t place = p.place[r];
    if (place < 0 || place >= p.places) continue;
    copy_row(p.x, r, n, p.weight, p.eps, p.hidden, static_cast<T*>(p.normed) + place * h);
    if (p.stream) copy_row(p.x, r, n, p.stream_normed ? p.weight : nullptr, p.eps, p.hidden, static_cast<T*>(p.stream) + place * h);
  }
}

}  // namespace

void launch_join_rows_cpu(const JoinRowsParams& p) { p.dtype == DType::kBF16 ? join_rows<bf16>(p) : join_rows<float>(p); }
void launch_keep_rows_cpu(const KeepRowsParams& p) { p.dtype == DType::kBF16 ? keep_rows<bf16>(p) : keep_rows<float>(p); }
void launch_head_input_cpu(const HeadInputParams& p) { p.dtype == DType::kBF16 ? head_input<bf16>(p) : head_input<float>(p); }
void launch_rms_norm_cpu(const RmsNormParams& p) { p.dtype == DType::kBF16 ? rms_norm<bf16>(p) : rms_norm<float>(p); }
void launch_embedding_cpu(const EmbeddingParams& p) { p.dtype == DType::kBF16 ? embedding<bf16>(p) : embedding<float>(p); }

}  // namespace specrt

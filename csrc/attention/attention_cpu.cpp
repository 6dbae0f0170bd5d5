// One implementation for trees, decode and prompts. A work item is (block of rows of one request, kv head, chunk of 256 positions): it widens
// each tile of K (transposed) and V to float32 once, for all rows and query heads of the block; tiles that reach into a row's own path are gathered for
// that row. The chunks' (m, l, O) are folded afterwards, in the canonical order, so that neither blocks nor threads can change a bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/params.h"
#include "attention/tile_cpu.h"
#include "base/parallel.h"

namespace specrt {
namespace {

constexpr int kBlockVectors = 96;               // query vectors (row x head) a block aims at: they share the widening of a tile
constexpr int64_t kPartialFloats = 1 << 20;     // bound of the chunks' results held at a time

struct Row {
  int prefix, len, first;  // first visible position: 0, or len - window
  const int32_t* path;
};

struct Block {
  int begin, end, request;
};

template <typename T, typename KV> class Attention {
 public:
  explicit Attention(const AttentionParams& p)
      : p_(p), group_(p.q_heads / p.kv_heads), dim_(p.head_dim), stride_(p.head_dim + 2), scale_(score_factor(p)) {
    const int n = std::min(*p.num_rows, p.rows);
    if (p.ancestors) nodes_.resize(static_cast<size_t>(n) * 64);
    for (int r = 0; r < n; ++r) rows_.push_back(describe(r));
    const int most = std::max(1, kBlockVectors / group_);
    for (int r = 0; r < n;) {
      int end = r + 1;
      while (end < n && end - r < most && p.row_request[end] == p.row_request[r]) ++end;
      blocks_.push_back({r, end, p.row_request[r]});
      r = end;
    }
  }

  // Waves of blocks, so that memory stays bounded however long the prompt is.
  void run() {
    for (size_t first = 0; first < blocks_.size();) {
      size_t last = first;
      int64_t vectors = 0;
      int chunks = 0;
      for (; last < blocks_.size(); ++last) {
        const int64_t v = vectors + block_vectors(blocks_[last]);
        const int c = std::max(chunks, block_chunks(blocks_[last]));
        if (last > first && v * c * p_.kv_heads * stride_ > kPartialFloats) break;
        vectors = v;
        chunks = c;
      }
      wave(first, last, vectors, chunks);
      first = last;
    }
  }

 private:
  Row describe(int r) {
    Row row{p_.row_prefix[r], p_.row_prefix[r], 0, nullptr};
    if (p_.ancestors) {
      int32_t* path = nodes_.data() + static_cast<size_t>(r) * 64;
      row.path = path;
      for (uint64_t word = static_cast<uint64_t>(p_.ancestors[r]); word; word &= word - 1) *path++ = __builtin_ctzll(word);
      row.len += static_cast<int>(path - row.path);
    } else if (p_.paths) {
      row.path = p_.paths + static_cast<int64_t>(r) * p_.path_depth;
      for (int d = 0; d < p_.path_depth && row.path[d] >= 0; ++d) ++row.len;
    }
    if (p_.window > 0) row.first = std::max(0, row.len - p_.window);
    return row;
  }

  int block_vectors(const Block& b) const { return (b.end - b.begin) * group_; }
  int block_chunks(const Block& b) const {
    int len = 0;
    for (int r = b.begin; r < b.end; ++r) len = std::max(len, rows_[r].len);
    return (len + kChunk - 1) / kChunk;
  }

  void wave(size_t first, size_t last, int64_t vectors, int chunks) {
    const int64_t heads = p_.kv_heads, chunk_floats = vectors * stride_;
    std::vector<int64_t> offset;  // of each block's query vectors among the wave's
    for (size_t b = first, v = 0; b < last; v += block_vectors(blocks_[b++])) offset.push_back(v);
    partial_.resize(std::max<size_t>(partial_.size(), heads * chunks * chunk_floats));
    auto partial = [&](int64_t b, int64_t head, int64_t chunk) { return partial_.data() + (head * chunks + chunk) * chunk_floats + offset[b] * stride_; };
    const int64_t count = static_cast<int64_t>(last - first), work = heads * chunks * vectors * kChunk * dim_ / 8;
    parallel_for(count * heads * chunks, work, [&](int64_t i) {
      const int64_t b = i / (heads * chunks), head = i / chunks % heads, chunk = i % chunks;
      attend_chunk(blocks_[first + b], static_cast<int>(head), static_cast<int>(chunk), partial(b, head, chunk));
    });
    parallel_for(count * heads, work / 64, [&](int64_t i) {
      const int64_t b = i / heads, head = i % heads;
      fold_chunks(blocks_[first + b], static_cast<int>(head), partial(b, head, 0), chunk_floats);
    });
  }

  // The visible part of [begin, begin + size) for a row, relative to begin; empty where end <= begin.
  static Span visible(const Row& row, int begin, int size) { return {std::max(0, row.first - begin), std::min(size, row.len - begin)}; }

  void attend_chunk(const Block& block, int head, int chunk, float* partial) {
    const int vectors = block_vectors(block), begin = chunk * kChunk;
    bool seen = false;
    for (int r = block.begin; r < block.end; ++r) seen = seen || !visible(rows_[r], begin, kChunk).empty();
    if (!seen) return;
    thread_local std::vector<float> memory;
    thread_local std::vector<Span> spans;
    memory.resize(static_cast<size_t>(vectors) * (dim_ + kTile + 1) + 2 * static_cast<size_t>(kTile) * dim_);
    spans.resize(vectors);
    float* q = memory.data();
    float *keys_at = q + vectors * dim_, *values_at = keys_at + kTile * dim_, *scores_at = values_at + kTile * dim_;
    const TileScratch scratch{keys_at, values_at, scores_at, scores_at + vectors * kTile};
    for (int r = block.begin, i = 0; r < block.end; ++r)
      widen(static_cast<const T*>(p_.q) + (static_cast<int64_t>(r) * p_.q_heads + head * group_) * dim_, q + (i++) * group_ * dim_, group_ * dim_);
    float *m = partial, *l = partial + vectors, *o = partial + 2 * vectors;
    std::fill(m, l, -INFINITY);
    std::fill(l, o + vectors * dim_, 0.0f);

    const KV *keys[kTile], *values[kTile];
    for (int tile = begin; tile < begin + kChunk; tile += kTile) {
      Span all{kTile, 0};  // what the rows without path positions in this tile see together
      for (int r = block.begin; r < block.end; ++r) {
        Span span = reaches_path(rows_[r], tile) ? Span{0, 0} : visible(rows_[r], tile, kTile);
        std::fill_n(spans.data() + (r - block.begin) * group_, group_, span);
        if (!span.empty()) all = {std::min(all.begin, span.begin), std::max(all.end, span.end)};
      }
      if (!all.empty()) {
        for (int i = all.begin; i < all.end; ++i) locate(block.request, head, tile + i, keys[i], values[i]);
        load_tile(keys, values, all, dim_, scratch);
        attend_tile<T>(vectors, dim_, q, spans.data(), scale_, scratch, m, l, o);
      }
      for (int r = block.begin; r < block.end; ++r) {
        const Row& row = rows_[r];
        const Span span = visible(row, tile, kTile);
        if (!reaches_path(row, tile) || span.empty()) continue;
        for (int i = span.begin; i < span.end; ++i) {
          const int position = tile + i, slot = position < row.prefix ? position : row.prefix + row.path[position - row.prefix];
          locate(block.request, head, slot, keys[i], values[i]);
        }
        load_tile(keys, values, span, dim_, scratch);
        const int v = (r - block.begin) * group_;
        std::fill_n(spans.data() + v, group_, span);
        attend_tile<T>(group_, dim_, q + v * dim_, spans.data() + v, scale_, scratch, m + v, l + v, o + v * dim_);
      }
    }
  }

  static bool reaches_path(const Row& row, int tile) { return row.len > row.prefix && tile + kTile > row.prefix; }

  void locate(int request, int head, int slot, const KV*& key, const KV*& value) const {
    const int64_t page = p_.block_table[static_cast<int64_t>(request) * p_.max_pages + slot / p_.page];
    const int64_t at = ((page * p_.kv_heads + head) * p_.page + slot % p_.page) * dim_;
    key = static_cast<const KV*>(p_.k_pool) + at;
    value = static_cast<const KV*>(p_.v_pool) + at;
  }

  void fold_chunks(const Block& block, int head, const float* partial, int64_t chunk_floats) {
    const int vectors = block_vectors(block);
    std::vector<float> memory(2 * dim_);
    for (int v = 0; v < vectors; ++v) {
      const Row& row = rows_[block.begin + v / group_];
      State total{-INFINITY, 0.0f, memory.data()}, group{-INFINITY, 0.0f, memory.data() + dim_};
      std::fill(memory.begin(), memory.end(), 0.0f);
      const int chunks = (row.len + kChunk - 1) / kChunk;
      for (int c = row.first / kChunk; c < chunks; ++c) {
        const float* from = partial + c * chunk_floats;
        fold(group, from[v], from[vectors + v], from + 2 * vectors + static_cast<int64_t>(v) * dim_, dim_);
        if (c + 1 < chunks && (c + 1) % kGroupChunks) continue;
        fold(total, group.m, group.l, group.o, dim_);
        group.m = -INFINITY;
        group.l = 0.0f;
        std::fill_n(group.o, dim_, 0.0f);
      }
      const int64_t r = block.begin + v / group_;
      T* out = static_cast<T*>(p_.out) + (r * p_.q_heads + head * group_ + v % group_) * dim_;
      const float factor = 1.0f / total.l * p_.v_scale;
      for (int d = 0; d < dim_; ++d) out[d] = round_to<T>(row.len > 0 ? total.o[d] * factor : 0.0f);
    }
  }

  const AttentionParams& p_;
  const int group_, dim_, stride_;
  const float scale_;
  std::vector<Row> rows_;
  std::vector<Block> blocks_;
  std::vector<int32_t> nodes_;
  std::vector<float> partial_;
};

}  // namespace

void launch_tree_attention_cpu(const AttentionParams& p) {
  const bool fp8 = p.kv_dtype == DType::kE4M3;
  if (p.dtype == DType::kBF16) fp8 ? Attention<bf16, e4m3>(p).run() : Attention<bf16, bf16>(p).run();
  else fp8 ? Attention<float, e4m3>(p).run() : Attention<float, float>(p).run();
}
void launch_prefill_attention_cpu(const AttentionParams& p) { launch_tree_attention_cpu(p); }

}  // namespace specrt

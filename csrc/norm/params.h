// Row-wise ops: RMSNorm, embedding lookup with the first half of a deferred one, embedding and norms at once for a draft head.
//
// Reduction order (csrc/README.md, 5): sums of squares as base/squares.h says; rms_norm: 2048 lanes stride the row, lane i takes elements i, i + 2048, ... ascending in one fma chain; neighbours fold
// pairwise, lane i = lane 2i + lane 2i + 1, until one is left.
#pragma once
#include "base/types.h"

namespace specrt {

constexpr int kNormLanes = 2048;

// `early`, of two ops: on CUDA they may work beside the kernel before, which writes nothing that they read, reads nothing that they write, and lets them start after its own wait alone
// (attention_plan). It costs what they take, where both are short.

struct RmsNormParams {
  DType dtype;
  const void* x;         // [R, H]
  const void* weight;    // [H]
  void* out;             // [R, H], may be x
  float eps;
  const int32_t* num_rows;
  int rows, hidden;      // R (capacity), H
};

// Rows of a table, and what linear wants of a row that no linear has written (gemm/params.h): scaled = round(out * weight), and the sums of squares of out.
struct EmbeddingParams {
  DType dtype;
  const void* table;     // [V, H]
  const int32_t* ids;    // [R]
  const void* weight;    // [H]
  void* out;             // [R, H]; NaN where the id is outside [0, V)
  void* scaled;          // [R, H]
  float* squares;        // [R, square_pitch(H)]
  const int32_t* num_rows;
  bool early;            // as below
  int rows, vocab, hidden;
};

// What a draft head's first layer, or the projection before it, reads: a token and a feature side by side, each after its norm if it has one.
struct HeadInputParams {
  DType dtype;
  const void* table;           // [V, H]
  const int32_t* ids;          // [R]
  const void* feature;         // [F, H]
  const int32_t* parent;       // [R] rows of feature, or null: row r's is row r
  const void* token_weight;    // [H] or null: no norm
  const void* feature_weight;  // [H] or null
  void* joined;                // [R, 2 H]; NaN where an id or a parent is outside
  void* stream;                // [R, H] or null: the feature again, not joined
  const int32_t* num_rows;
  float eps;
  bool feature_first;          // in joined
  bool stream_normed;          // whether `stream` is the feature after its norm
  bool early;
  int rows, vocab, features, hidden;  // R (capacity), V, F, H
};

// Rows of several tables side by side, each after its norm if it has one.
constexpr int kMostParts = 16;
struct JoinRowsParams {
  DType dtype;
  const void* parts[kMostParts];    // [F, H] each
  const void* weights[kMostParts];  // [H] each, or null: no norm
  const int32_t* source;            // [R] rows of the parts, or null: row r's is row r; -1: `missing`
  const void* missing;              // [count H] or null
  void* out;                        // [R, count H]; NaN where there is no such row
  const int32_t* num_rows;
  float eps;
  int count, rows, features, hidden;  // parts, R (capacity), F, H
};

// The last step of a head, for rows that are kept: row r's norm to row place[r] of `normed`, the row itself (or its norm) to `stream`.
struct KeepRowsParams {
  DType dtype;
  const void* x;         // [R, H]
  const void* weight;    // [H] or null: no norm
  const int32_t* place;  // [R]; outside [0, B): the row is not kept
  void* normed;          // [B, H]
  void* stream;          // [B, H] or null
  const int32_t* num_rows;
  float eps;
  bool stream_normed;
  int rows, places, hidden;  // R (capacity), B, H
};

void launch_join_rows_cpu(const JoinRowsParams& p);
void launch_join_rows_cuda(const JoinRowsParams& p, void* stream);
void launch_keep_rows_cpu(const KeepRowsParams& p);
void launch_keep_rows_cuda(const KeepRowsParams& p, void* stream);
void launch_head_input_cpu(const HeadInputParams& p);
void launch_head_input_cuda(const HeadInputParams& p, void* stream);
void launch_rms_norm_cpu(const RmsNormParams& p);
void launch_rms_norm_cuda(const RmsNormParams& p, void* stream);
void launch_embedding_cpu(const EmbeddingParams& p);
void launch_embedding_cuda(const EmbeddingParams& p, void* stream);

}  // namespace specrt

// Token trees: their packed rows, the walk that accepts a path, n-gram lookup, and the expansion and re-ranking of a drafter's tree.
//
// Everything here is integers, but for the scores of n-gram children and of candidates: float32, one addition a level from the root down, and a
// sum over siblings in ascending order (ngram_cpu.cpp). Ties go to the lower index. CPU and CUDA give the same bits.
// A tree has N <= kMaxNodes nodes, parents before children; node 0 is the root, whose token is known and whose KV is not yet written.
#pragma once
#include "base/types.h"

namespace specrt {

constexpr int kMaxNodes = 64;         // an ancestor word has 64 bits
constexpr int kMaxCandidates = 4096;  // of one slot's expansion: their keys stand in shared memory
constexpr int kMaxOccurrences = 32;   // of an n-gram: a tree node is the set of the occurrences that run through it, one 32-bit word

struct Paging {
  const int32_t* block_table;  // [B, max_pages]
  int max_pages, page_size;
};

struct TreeBuildParams {
  const int32_t *tree_token, *tree_parent;  // [B, N]
  const int32_t* active;                    // [B]
  int32_t* tree_size;                       // [B]; 0 where the slot is not active
  const int32_t* seq_lens;                  // [B]
  Paging paging;
  int32_t* tree_depth;                      // [B, N]
  int64_t* tree_ancestors;                  // [B, N]
  int32_t* row_offset;                      // [B + 1]
  int32_t *row_request, *row_node, *row_token, *row_position, *row_prefix;  // [R]
  int64_t *row_slot, *row_ancestors;        // [R]
  int32_t* num_rows;                        // [1], never above R: rows that do not fit are dropped
  int batch, nodes, rows;                   // B, N, R
};

struct SpanRowsParams {
  const int32_t* history;                   // [B, T]
  const int32_t *start, *end;               // [B]
  Paging paging;
  int32_t* row_offset;                      // [B + 1]
  int32_t *row_request, *row_token, *row_position, *row_prefix;  // [R]
  int64_t* row_slot;                        // [R]
  int32_t* num_rows;                        // [1]
  int batch, max_len, rows;                 // B, T, R
};

struct PathRowsParams {
  const int32_t* history;                   // [B, T]
  const int32_t *seq_lens, *path_len;       // [B], after the round
  const int32_t* max_nodes;                 // [B]
  const int32_t* levels;                    // [B] or null: 1; rows of a slot that are kept, the last of the path and mask rows behind it
  const int32_t* path;                      // [B, N]
  const int32_t* row_offset;                // [B + 1], of the round
  Paging paging;
  int32_t *row_request, *row_token, *row_position, *row_prefix;  // [R]
  int64_t* row_slot;                        // [R]
  int32_t *row_source, *row_place;          // [R]
  int32_t* num_rows;                        // [1]
  int batch, max_len, nodes, rows;          // B, T, N, R
  int most_levels, mask_token;
};

struct AcceptWalkParams {
  const int32_t *tree_token, *tree_parent;  // [B, N]
  const int32_t* tree_size;                 // [B]
  const int32_t* row_offset;                // [B + 1]
  const int32_t *row_target, *row_status;   // [R]
  int32_t *path, *emitted;                  // [B, N]
  int32_t *path_len, *error;                // [B]
  int batch, nodes;
};

struct AcceptSyntheticParams {
  AcceptWalkParams tree;
  const int32_t* seq_lens;                  // [B]
  const int64_t* seeds;                     // [B]
  int whole;                                // floor(A)
  float fraction;                           // A - floor(A): the chance of one node more
};

struct RoundAdvanceParams {
  const int32_t* path_len;                  // [B]
  const int32_t* emitted;                   // [B, N]
  const int32_t* limit;                     // [B]
  int32_t* seq_lens;                        // [B]
  int32_t* history;                         // [B, T]
  int32_t* output_count;                    // [B, V]
  int32_t* active;                          // [B]
  int32_t* tree_token;                      // [B, N]; node 0
  int batch, nodes, max_len, vocab;         // B, N, T, V
};

struct NgramProposeParams {
  const int32_t* history;                   // [B, T]
  const int32_t *seq_lens, *max_nodes, *max_depth;  // [B]
  const int64_t* seeds;                     // [B]
  const float* sampling_f;                  // [B, 6], temperature first
  int32_t *tree_token, *tree_parent;        // [B, N]
  int32_t* tree_size;                       // [B]
  int min_n, max_n, branches;
  int batch, nodes, max_len;                // B, N, T
};

struct DraftLimitsParams {
  const int32_t *max_nodes, *max_depth, *seq_lens, *active;  // [B]
  int32_t *nodes, *depth, *base;            // [B]; base or null
  int batch, lag;
};

struct TreeExpandParams {
  const int32_t* topk_token;                // [rows, k]
  const float* topk_score;                  // [rows, k], or null: 0 for every child that there is
  const int32_t *max_depth, *seq_lens;      // [B]
  Paging paging;
  int32_t *cand_token, *cand_parent;        // [B, C]
  float* cand_score;                        // [B, C]
  int32_t* beam;                            // [B, W]
  int32_t *row_request, *row_token, *row_position, *row_prefix;  // [R], R >= B W
  int64_t* row_slot;                        // [R]
  int32_t* row_path;                        // [R, path_depth], path_depth >= level
  int32_t* row_parent;                      // [R] row of topk_token that it is a child of
  int32_t* num_rows;                        // [1]
  int level, beam_width, topk;              // W, k
  int batch, candidates, path_depth, rows;  // B, C; rows of topk: a row past them has no children
};

struct TreeSelectParams {
  const int32_t *max_nodes, *max_depth;     // [B]
  const int32_t *cand_token, *cand_parent;  // [B, C]
  const float* cand_score;                  // [B, C]
  int32_t *tree_token, *tree_parent;        // [B, N]
  int32_t* tree_size;                       // [B]
  int levels, beam_width, topk;
  int batch, candidates, nodes;             // B, C, N
};

void launch_tree_build_cpu(const TreeBuildParams& p);
void launch_tree_build_cuda(const TreeBuildParams& p, void* stream);
void launch_span_rows_cpu(const SpanRowsParams& p);
void launch_span_rows_cuda(const SpanRowsParams& p, void* stream);
void launch_path_rows_cpu(const PathRowsParams& p);
void launch_path_rows_cuda(const PathRowsParams& p, void* stream);
void launch_accept_walk_cpu(const AcceptWalkParams& p);
void launch_accept_walk_cuda(const AcceptWalkParams& p, void* stream);
void launch_accept_synthetic_cpu(const AcceptSyntheticParams& p);
void launch_accept_synthetic_cuda(const AcceptSyntheticParams& p, void* stream);
void launch_round_advance_cpu(const RoundAdvanceParams& p);
void launch_round_advance_cuda(const RoundAdvanceParams& p, void* stream);
void launch_ngram_propose_cpu(const NgramProposeParams& p);
void launch_ngram_propose_cuda(const NgramProposeParams& p, void* stream);
void launch_draft_limits_cpu(const DraftLimitsParams& p);
void launch_draft_limits_cuda(const DraftLimitsParams& p, void* stream);
void launch_tree_expand_cpu(const TreeExpandParams& p);
void launch_tree_expand_cuda(const TreeExpandParams& p, void* stream);
void launch_tree_select_cpu(const TreeSelectParams& p);
void launch_tree_select_cuda(const TreeSelectParams& p, void* stream);

}  // namespace specrt

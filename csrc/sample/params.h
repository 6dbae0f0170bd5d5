// Sampling: logits -> transformed logits z -> token, log-probabilities, drafts, and the rejection verifiers.
//
// CPU and CUDA give the same bits. Every sum either has one stated order or has none:
//   * log-sum-exp (csrc/README.md, 6): blocks of 128 tokens, m_j = max, s_j = sum exp(z - m_j): lane i of 32 sums tokens 4i..4i+3 ascending,
//     the lanes fold by a butterfly 16, 8, 4, 2, 1; over the row M = max m_j, S = sum over j ascending of s_j exp(m_j - M), lse = M + log S.
//   * everything else that is summed (top-p mass, residual mass) is an integer: no order.
//   * every choice is a maximum with the lowest token id on ties: no order.
#pragma once
#include "base/choice.h"

namespace specrt {

struct SampleTransformParams {
  float* logits;                  // [R, V], in place
  const int32_t* row_request;     // [R]
  const int32_t* row_position;    // [R] position of the row's input token
  const int32_t* row_node;        // [R] or null: rows are no tree nodes
  const int32_t* tree_token;      // [B, N] or null
  const int64_t* tree_ancestors;  // [B, N] or null
  const float* sampling_f;        // [B, 6]
  const int32_t* sampling_i;      // [B, 5]
  const int32_t* stop_ids;        // [B, S], -1 pads
  const float* bias;              // [B, V]
  const int32_t* output_count;    // [B, V]
  const uint8_t* prompt_mask;     // [B, V]
  const int32_t* mask_bits;       // [masks, ceil(V/32)] or null
  const int32_t* row_mask;        // [R] or null; -1: no mask
  const int32_t* num_rows;
  int32_t* status;                // [R]
  const int64_t* seeds;           // [B], with token
  int32_t* token;                 // [R] or null: what sample_exact would choose; 0 where the status is not OK
  bool keep;                      // false: nobody reads the logits afterwards, they may be left in any state
  int rows, vocab, nodes, stops;  // R, V, N, S
};
constexpr int kTransformVocab = 3 << 17;  // on CUDA: a row fits a cluster's shared memory

struct SampleExactParams {
  const float* z;               // [R, V]
  const int32_t* row_request;   // [R]
  const int32_t* row_position;  // [R]
  const int64_t* seeds;         // [B]
  const float* sampling_f;      // [B, 6]
  const int32_t* num_rows;
  int32_t* token;               // [R]
  int rows, vocab;
};

struct RowLogprobsParams {
  const float* z;        // [R, V]
  const int32_t* token;  // [R]
  const int32_t* num_rows;
  float* lse;            // [R]
  float* logprob;        // [R]
  int32_t* top_token;    // [R, n]
  float* top_logprob;    // [R, n]
  int rows, vocab, top;  // R, V, n
};

struct DraftTopkParams {
  const float* z;               // [R, V]
  const int32_t* row_request;   // [R]
  const int32_t* row_position;  // [R]
  const int64_t* seeds;         // [B]
  const float* sampling_f;      // [B, 6]
  const int32_t* num_rows;
  float* perturbed;             // [R, V] scratch
  int32_t* token;               // [R, k]
  float* score;                 // [R, k]
  int noise;                    // purpose, or -1
  int rows, vocab, k;
};

// A child's score is h less the log-sum-exp of h over the drafter's own columns, in the order above: h = z without noise and z + G with it, but of a head with the
// target's noise h = T (1.2 z + G), which says what the target will choose (kHeadSlope in token.h).
// On CUDA, of rows of logits that are their own (slot_rows 0), all but the logits is read before the kernel that makes these has ended: what writes it must be
// older, by a kernel that waits before it starts the next one (ptx/dependency.cuh).
struct DraftChildrenParams {
  const float* logits;          // [L, D]; of row r: row r, or with slot_rows row request * slot_rows + level
  const int64_t* ids;           // [D], ascending, or null: 0, 1, ...
  const int32_t* row_request;   // [R]
  const int32_t* row_position;  // [R]
  const float* sampling_f;      // [B, 6]
  const int32_t* sampling_i;    // [B, 5]
  const int32_t* stop_ids;      // [B, S], -1 pads
  const float* bias;            // [B, V]
  const int64_t* seeds;         // [B]
  const int32_t* num_rows;
  int32_t* token;               // [R, k]
  float* score;                 // [R, k] or null: nobody ranks them
  int ahead;                    // the child's position - row_position
  int noise;                    // purpose, or -1
  int rows, columns, vocab, stops, k;  // R, D, V, S
  int slot_rows, level;
  bool of_head;                 // the drafter reads the target's features

  // Whether rows of this temperature have the score of a head with the target's noise.
  SPECRT_HD bool foretells(float temperature) const { return of_head && noise == kNoiseShared && temperature > 0.0f; }
  SPECRT_HD const float* own(int64_t row) const { return logits + (slot_rows ? static_cast<int64_t>(row_request[row]) * slot_rows + level : row) * columns; }
};
constexpr int kChildrenVocab = 5 << 16;  // the drafter's, on CUDA: as kTransformVocab, with the statistics of the row's blocks beside it

struct AcceptRejectionParams {
  const float* z;              // [R, V]
  const int32_t* row_status;   // [R]
  const int32_t* row_offset;   // [B+1]
  const int32_t* tree_token;   // [B, N]
  const int32_t* tree_parent;  // [B, N]
  const int32_t* tree_size;    // [B]
  const int32_t* seq_lens;     // [B]
  const float* q;              // [B, D, V]
  const int32_t* q_levels;     // [B]
  const int64_t* seeds;        // [B]
  const float* sampling_f;     // [B, 6]
  float* scratch;              // [B, 2, V]
  int32_t* path;               // [B, N]
  int32_t* path_len;           // [B]
  int32_t* emitted;            // [B, N]
  int32_t* error;              // [B]
  int slots, nodes, depth, vocab;  // B, N, D, V
};

// The choice of rows whose blocks are given (base/choice.h): what sample_transform without filters, sample_exact and row_logprobs would have of the logits.
struct SampleBlocksParams {
  const BlockChoice* choice;  // [R, J]
  const float* sums;          // [R, J], with logprob
  const int32_t* num_rows;
  int32_t* token;             // [R]; 0 where the status is not OK
  int32_t* status;            // [R]
  float* logprob;             // [R] or null: of the token; -inf where the status is not OK
  int rows, blocks;           // R, J
};

void launch_sample_transform_cpu(const SampleTransformParams& p);
void launch_sample_transform_cuda(const SampleTransformParams& p, void* stream);
void launch_sample_exact_cpu(const SampleExactParams& p);
void launch_sample_exact_cuda(const SampleExactParams& p, void* stream);
void launch_sample_blocks_cpu(const SampleBlocksParams& p);
void launch_sample_blocks_cuda(const SampleBlocksParams& p, void* stream);
void launch_row_logprobs_cpu(const RowLogprobsParams& p);
void launch_row_logprobs_cuda(const RowLogprobsParams& p, void* stream);
void launch_draft_topk_cpu(const DraftTopkParams& p);
void launch_draft_topk_cuda(const DraftTopkParams& p, void* stream);
void launch_draft_children_cpu(const DraftChildrenParams& p);
void launch_draft_children_cuda(const DraftChildrenParams& p, void* stream);
void launch_accept_rejection_cpu(const AcceptRejectionParams& p);
void launch_accept_rejection_cuda(const AcceptRejectionParams& p, void* stream);

}  // namespace specrt

// Row-wise ops: RMSNorm (with the residual add), SiLU-mul, embedding lookup.
//
// Reduction order (csrc/README.md, 5): 2048 lanes stride the row, lane i takes elements i, i + 2048, ... ascending in one fma chain; neighbours fold
// pairwise, lane i = lane 2i + lane 2i + 1, until one is left.
#pragma once
#include "base/types.h"

namespace specrt {

constexpr int kNormLanes = 2048;

struct RmsNormParams {
  DType dtype;
  const void* x;         // [R, H]
  void* residual;        // [R, H] or null; updated to round(residual + x)
  const void* weight;    // [H]
  void* out;             // [R, H], may be x
  float eps;
  const int32_t* num_rows;
  int rows, hidden;      // R (capacity), H
};

struct SiluMulParams {
  DType dtype;
  const void* gate_up;   // [R, 2I], gate first
  void* out;             // [R, I]
  const int32_t* num_rows;
  int rows, inter;
};

struct EmbeddingParams {
  DType dtype;
  const void* table;     // [V, H]
  const int32_t* ids;    // [R]
  void* out;             // [R, H]; NaN where the id is outside [0, V)
  const int32_t* num_rows;
  int rows, vocab, hidden;
};

void launch_rms_norm_cpu(const RmsNormParams& p);
void launch_rms_norm_cuda(const RmsNormParams& p, void* stream);
void launch_silu_mul_cpu(const SiluMulParams& p);
void launch_silu_mul_cuda(const SiluMulParams& p, void* stream);
void launch_embedding_cpu(const EmbeddingParams& p);
void launch_embedding_cuda(const EmbeddingParams& p, void* stream);

}  // namespace specrt

// Linear layers, y = x W^T (+ b), and the packing of their weights.
//
// Reduction order (csrc/README.md, 3): a function of W's shape alone, so that a row has the same bits whatever the number of rows.
//   CPU: one fp32 chain an output, k ascending. float32: acc = fma(x_k, w_k, acc). bfloat16, in pairs: acc = fma(x_2j, w_2j, fma(x_2j+1, w_2j+1, acc)),
//     which is what vdpbf16ps computes (found by comparing 2e6 random cases on a Zen 5); that instruction also reads denormals as zero and flushes
//     denormal results to zero, the portable code does not.
//   CUDA bfloat16: K padded with zeros to T steps of 64, cut in S = num_ranges(N) contiguous ranges [s T / S, (s+1) T / S); a range is one tensor-core chain
//     from zero, k ascending in steps of 16; the range sums are added ascending, to zero; then the bias. CUDA float32: one fma chain, k ascending, then the bias.
// The bias is added to the sum in fp32, then comes the one rounding to out's dtype.
#pragma once
#include "base/types.h"

namespace specrt {

constexpr int kPanel = 64;  // outputs a panel of packed weights

struct PackLinearParams {
  DType dtype;
  const void* weight;  // [N, K]
  // CPU: [ceil(N/64), ceil(K/g), 64, g], g = 2 for bfloat16 and 1 for float32: either way 256 bytes a step of k.
  // CUDA, bfloat16 only: [ceil(N/64), ceil(K/64), 64, 64]: blocks of 64 outputs x 64 k of 8 KiB, each as a bulk copy brings it to shared memory and wgmma reads it
  // there: a row of 128 bytes an output, whose eight 16-byte chunks are permuted, chunk c at c ^ (output % 8) (the 128-byte swizzle, ptx/wgmma.cuh).
  // Both zero-padded.
  void* packed;
  int out_features, in_features;  // N, K
};

struct LinearParams {
  DType dtype, out_dtype;  // of x, weight and bias; of out (dtype, or float32)
  const void* x;           // [R, K]
  const void* weight;      // packed as above; CUDA float32: [N, K]
  const void* bias;        // [N] or null
  void* out;               // [R, N], not overlapping x
  const int32_t* num_rows;
  int rows, out_features, in_features;  // R (capacity), N, K
};

void launch_pack_linear_cpu(const PackLinearParams& p);
void launch_pack_linear_cuda(const PackLinearParams& p, void* stream);
void launch_linear_cpu(const LinearParams& p);
void launch_linear_cuda(const LinearParams& p, void* stream);

}  // namespace specrt

// Linear layers, y = x W^T (+ b), and the packing of their weights.
//
// Reduction order (csrc/README.md, 3): a function of W's shape alone, so that a row has the same bits whatever the number of rows.
//   CPU: one fp32 chain an output, k ascending. float32: acc = fma(x_k, w_k, acc). bfloat16, in pairs: acc = fma(x_2j, w_2j, fma(x_2j+1, w_2j+1, acc)),
//     which is what vdpbf16ps computes (found by comparing 2e6 random cases on a Zen 5); that instruction also reads denormals as zero and flushes
//     denormal results to zero, the portable code does not.
//   CUDA bfloat16: K padded with zeros to T steps of 64, cut in S = num_ranges(N) contiguous ranges [s T / S, (s+1) T / S); a range is one tensor-core chain
//     from zero, k ascending in steps of 16; the first range's sum plus the second's; then the bias. CUDA float32: one fma chain, k ascending, then the bias.
// What then happens to a sum, all in fp32 (Finish): it is multiplied by its row's 1 / rms where `squares` is given, the bias is added, and
//   kStore     it is rounded to out's dtype.
//   kSilu      W's rows interleave gate and up in eights (rows 16 i + e and 16 i + 8 + e, e < 8: gate and up of channel 8 i + e); both are rounded, and
//              out = round(round(g / (1 + exp(-g))) * up), [R, N / 2].
//   kResidual  it is rounded, h = round(residual + it); for the next layer, where next_weight is given, scaled = round(h * next_weight) and the sums of squares of h.
//   kChoose    (lm_head, fp32) nothing of it is stored but what the choice of the row's token needs of each 128 outputs: base/choice.h, to the bits that the sampler (sample/)
//              would have of the row of logits; sample_blocks (sample/params.h) does the rest.
// So an RMSNorm is never a kernel of its own: norm(h) W^T = r (h * weight) W^T with r = 1 / rms(h), and r commutes with the product (base/squares.h: the order of r's sum).
//
// FP8: K is padded with zeros to blocks of 128. A block's sum is taken from zero: CPU, the chain of bfloat16 above on the widened values; CUDA, one chain of four
// wgmma k32, k ascending. It is promoted at once, blocks ascending: acc = fma(sum, sx[b, r] * sw[b, n], acc), the product of the scales rounded. CUDA cuts the T blocks
// in S = num_ranges(N) ranges, the second from T / 2 on, each acc from zero, the first plus the second; the CPU has one range.
// The bias is float32; what then happens to a sum is as above (Finish), in out_dtype.
#pragma once
#include "base/choice.h"
#include "base/fp8.h"
#include "base/squares.h"

namespace specrt {

constexpr int kPanel = 64;  // outputs a panel of packed weights

struct PackLinearParams {
  DType dtype;         // kF32, kBF16 or kE4M3
  const void* weight;  // [N, K]
  // Zero-padded. CPU: [ceil(N/64), ceil(K/g), 64, g], g = 1 for float32 and 2 otherwise: 256 bytes a step of k (e4m3: 128).
  // CUDA (not for float32): [ceil(N/64), ceil(K/s), 64, s], s = 64 for bfloat16 and 128 for e4m3: units of 64 outputs x 128 bytes of k, each as a bulk copy brings it to
  // shared memory and wgmma reads it there: the eight 16-byte chunks of a row permuted, chunk c at c ^ (output % 8) (the 128-byte swizzle, ptx/wgmma.cuh).
  void* packed;
  int out_features, in_features;  // N, K
};

enum class Finish : int32_t { kStore, kSilu, kResidual, kChoose };

struct LinearParams {
  DType dtype, out_dtype;  // of x, weight and bias; of what follows the sums: out (dtype, or with kStore float32), residual, next_weight, scaled
  const void* x;           // [R, K]
  const void* weight;      // packed as above; CUDA float32: [N, K]
  const void* bias;        // [N] or null
  void* out;               // [R, N] (kSilu: [R, N / 2]), not overlapping x; with kResidual and kChoose null
  const int32_t* num_rows;
  int rows, out_features, in_features;  // R (capacity), N, K
  const float* squares;    // [R, square_pitch(K)] or null: sums of squares of what x was before it was multiplied by a norm's weight
  float eps;               // of that norm
  Finish finish;
  const void* residual;    // kResidual: [R, N]
  void* residual_out;      // kResidual: [R, N], may be residual
  const void* next_weight; // kResidual: [N] or null
  void* scaled;            // with next_weight: [R, N]
  float* next_squares;     // with next_weight: [R, square_pitch(N)]
  // kChoose; bias and squares are null, and it is not for FP8.
  const int32_t* row_request;   // [R]
  const int32_t* row_position;  // [R] of the row's input token
  const int64_t* seeds;         // [B]
  const float* sampling_f;      // [B, 6]
  BlockChoice* choice;          // [R, ceil(N/128)]
  float* sums;                  // [R, ceil(N/128)] or null: sum of exp(z - max) of each block, for log-probabilities
};

SPECRT_HD RowChoice row_choice(const LinearParams& p, int64_t row) {
  const int b = p.row_request[row];
  return {p.sampling_f[b * kSamplingF + kTemperature], p.row_position[row] + 1, p.seeds[b]};
}

// Rows of scales that stand side by side for a block of k: R, so that bulk copies of any 16 of them are aligned.
SPECRT_HD int scale_pitch(int rows) { return (rows + 15) / 16 * 16; }

// Activations for linear_fp8. For each row and block of 128 columns (the last may be shorter): scale = scale_of(max |x|), q = e4m3(x / scale): one fp32 division, one rounding
// to nearest even, saturated. No order anywhere: the same bits on both backends.
struct QuantizeFp8Params {
  DType dtype;       // of x
  const void* x;     // [R, K]
  e4m3* q;           // [R, K]
  float* scale;      // [ceil(K/128), scale_pitch(R)]
  const int32_t* num_rows;
  int rows, columns;  // R (capacity), K
};

// Up to so many rows of bfloat16 linear_fp8 quantises itself on CUDA, to the same bits. More take longer than the weights (8 rows: down of the 8B shape 36 us, with a kernel before it 24).
constexpr int kSelfQuantizedRows = 4;

struct LinearFp8Params {
  // dtype kE4M3: x as quantize_fp8 writes it; CUDA, up to kSelfQuantizedRows rows: or kBF16. weight packed (CPU: as above; CUDA: in units of 64 outputs x 128 k, pack.cu,
  // [ceil(N/64), ceil(K/128), 64, 128]); bias float32. out_dtype kF32 or kBF16.
  LinearParams linear;
  const float* x_scale;       // [ceil(K/128), scale_pitch(R)]; of bfloat16 x null
  const float* weight_scale;  // [weight_blocks, N]
  int weight_blocks;          // 1: one scale an output; ceil(K/128): one an output and block of 128 k
};

void launch_pack_linear_cpu(const PackLinearParams& p);
void launch_pack_linear_cuda(const PackLinearParams& p, void* stream);
void launch_linear_cpu(const LinearParams& p);
void launch_linear_cuda(const LinearParams& p, void* stream);
void launch_quantize_fp8_cpu(const QuantizeFp8Params& p);
void launch_quantize_fp8_cuda(const QuantizeFp8Params& p, void* stream);
void launch_linear_fp8_cpu(const LinearFp8Params& p);
void launch_linear_fp8_cuda(const LinearFp8Params& p, void* stream);

}  // namespace specrt

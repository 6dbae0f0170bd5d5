// Activations to e4m3: one warp a row and block of 128 columns, four columns a lane. Bytes: x once, a byte a column and four a block.
#include "base/launch.h"
#include "gemm/quantize.cuh"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kWarps = 4;  // blocks of 128 columns a CTA

// columns % 4 == 0 and x 16-byte aligned (ops/gemm.cpp), so that a lane's four columns are there or not together, and one load and one store.
template <typename T> __global__ void __launch_bounds__(32 * kWarps) quantize_fp8_kernel(const __grid_constant__ QuantizeFp8Params p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int row = blockIdx.x, block = blockIdx.y * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = (p.columns + kScaleBlock - 1) / kScaleBlock;
  if (row >= *p.num_rows || block >= blocks) return;  // the same for a whole warp
  const int column = block * kScaleBlock + lane * 4;
  const bool valid = column < p.columns;
  const int64_t at = static_cast<int64_t>(row) * p.columns + column;
  Packed<T> x{};
  if (valid) x.all = *reinterpret_cast<const decltype(x.all)*>(static_cast<const T*>(p.x) + at);
  const QuantizedFour q = quantize_four(x);
  if (lane == 0) p.scale[static_cast<int64_t>(block) * scale_pitch(p.rows) + row] = q.scale;
  if (valid) *reinterpret_cast<uint32_t*>(p.q + at) = q.values;
}

template <typename T> void quantize_rows(const QuantizeFp8Params& p, cudaStream_t stream) {
  const int blocks = (p.columns + kScaleBlock - 1) / kScaleBlock;
  launch({dim3(p.rows, (blocks + kWarps - 1) / kWarps), dim3(32 * kWarps), 0, stream, 1, true}, quantize_fp8_kernel<T>, p);
}

}  // namespace

void launch_quantize_fp8_cuda(const QuantizeFp8Params& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? quantize_rows<bf16>(p, s) : quantize_rows<float>(p, s);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace specrt

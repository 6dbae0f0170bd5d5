// Packing of weights [N, K] in units of 64 outputs x 128 bytes of k, zero-padded, as the linear kernels copy them: [ceil(N/64), ceil(K bytes/128)] units, in each the
// 16-byte chunk c of row r at place c ^ (r % 8), where the tensor cores look for it. A thread a chunk.
#include "base/check.h"
#include "gemm/params.h"
#include "gemm/tile.cuh"

namespace specrt {
namespace {

constexpr int kChunks = kUnitBytes / 16;  // of a unit

// row_bytes % 16 == 0.
__global__ void pack_kernel(const char* weight, uint4* packed, int rows, int row_bytes, int units_k) {
  const int64_t chunk = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, unit = chunk / kChunks;
  if (unit >= static_cast<int64_t>((rows + 63) / 64) * units_k) return;
  const int place = chunk % kChunks, row = place / 8;
  const int64_t output = unit / units_k * 64 + row, byte = unit % units_k * 128 + (place % 8 ^ row % 8) * 16;
  packed[chunk] = output < rows && byte < row_bytes ? *reinterpret_cast<const uint4*>(weight + output * row_bytes + byte) : make_uint4(0, 0, 0, 0);
}

}  // namespace

void launch_pack_linear_cuda(const PackLinearParams& p, void* stream) {
  const int row_bytes = p.in_features * (p.dtype == DType::kBF16 ? 2 : 1), units_k = ceil_div(row_bytes, 128);
  const int64_t chunks = static_cast<int64_t>(ceil_div(p.out_features, 64)) * units_k * kChunks;
  pack_kernel<<<static_cast<unsigned>((chunks + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const char*>(p.weight), static_cast<uint4*>(p.packed), p.out_features, row_bytes, units_k);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace specrt

// RMSNorm, SiLU-mul, embedding. Memory-bound row-wise kernels: one warp a row (norm), one thread an element (the others); rows past
// *num_rows exit. Bytes: each row is read once or twice and written once.
#include "base/check.h"
#include "base/math.h"
#include "norm/params.h"

namespace specrt {
namespace {

constexpr int kWarps = 4;  // rows a block (norm)

template <typename T> __global__ void rms_norm_kernel(RmsNormParams p) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= *p.num_rows || row >= p.rows) return;
  const int64_t base = static_cast<int64_t>(row) * p.hidden;
  const T* x = static_cast<const T*>(p.x) + base;
  T* residual = p.residual ? static_cast<T*>(p.residual) + base : nullptr;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + base;
  float sum = 0.0f;
  for (int i = lane; i < p.hidden; i += 32) {
    float h = to_float(x[i]);
    if (residual) {
      T rounded = round_to<T>(to_float(residual[i]) + h);
      residual[i] = rounded;
      h = to_float(rounded);
    }
    sum = fma_rn(h, h, sum);
  }
  for (int d = 16; d; d >>= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
  const float r = 1.0f / sqrtf(sum / static_cast<float>(p.hidden) + p.eps);
  const T* h = residual ? residual : x;  // each lane reads back what it wrote itself
  for (int i = lane; i < p.hidden; i += 32) out[i] = round_to<T>(to_float(round_to<T>(to_float(h[i]) * r)) * to_float(weight[i]));
}

template <typename T> __global__ void silu_mul_kernel(SiluMulParams p) {
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const T* gate = static_cast<const T*>(p.gate_up) + static_cast<int64_t>(row) * 2 * p.inter;
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.inter;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < p.inter; i += gridDim.y * blockDim.x) {
    float g = to_float(gate[i]);
    float s = to_float(round_to<T>(g / (1.0f + exp_rn(-g))));
    out[i] = round_to<T>(s * to_float(gate[p.inter + i]));
  }
}

template <typename T> __global__ void embedding_kernel(EmbeddingParams p) {
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const int id = p.ids[row];
  const bool known = id >= 0 && id < p.vocab;
  const T* from = static_cast<const T*>(p.table) + (known ? static_cast<int64_t>(id) * p.hidden : 0);
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.hidden;
  for (int i = threadIdx.x; i < p.hidden; i += blockDim.x) out[i] = known ? from[i] : round_to<T>(bits_to_float(0x7fc00000u));
}

template <typename T> void rms_norm(const RmsNormParams& p, cudaStream_t s) { rms_norm_kernel<T><<<(p.rows + kWarps - 1) / kWarps, kWarps * 32, 0, s>>>(p); }
template <typename T> void silu_mul(const SiluMulParams& p, cudaStream_t s) { silu_mul_kernel<T><<<dim3(p.rows, (p.inter + 255) / 256), 256, 0, s>>>(p); }
template <typename T> void embedding(const EmbeddingParams& p, cudaStream_t s) { embedding_kernel<T><<<p.rows, 128, 0, s>>>(p); }

}  // namespace

void launch_rms_norm_cuda(const RmsNormParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? rms_norm<bf16>(p, s) : rms_norm<float>(p, s);
  SPECRT_CHECK_LAUNCH();
}

void launch_silu_mul_cuda(const SiluMulParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? silu_mul<bf16>(p, s) : silu_mul<float>(p, s);
  SPECRT_CHECK_LAUNCH();
}

void launch_embedding_cuda(const EmbeddingParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? embedding<bf16>(p, s) : embedding<float>(p, s);
  SPECRT_CHECK_LAUNCH();
}

}  // namespace specrt

// RMSNorm, rms_scale, embedding. Row-wise, memory- and latency-bound: a block a row (norm, embedding), in the pieces of row.cuh. Rows past *num_rows exit. Bytes: each row is read once and written once. All start while the kernel before them
// ends, and let the next one start at once.
#include "base/launch.h"
#include "base/squares.h"
#include "norm/row.cuh"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

template <typename T, bool kVector> __global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(RmsNormParams p) {
  ptx::launch_dependents();
  const RowWeight<T, kVector> weight(static_cast<const T*>(p.weight), p.hidden);
  ptx::grid_dependency_wait();
  const int row = blockIdx.x;
  if (row >= *p.num_rows) return;
  const int64_t base = static_cast<int64_t>(row) * p.hidden;
  T* out = static_cast<T*>(p.out) + base;
  norm_row(static_cast<const T*>(p.x) + base, weight, p.hidden, p.eps, [&](int i, const T (&y)[kVec]) { store8<T, kVector>(out + i, p.hidden - i, y); });
}

constexpr int kScaleThreads = 256;

// A thread a quad of columns, 16 threads a block of the sums.
template <typename T> __global__ void __launch_bounds__(kScaleThreads) rms_scale_kernel(RmsScaleParams p) {
  const int row = blockIdx.x, block = (blockIdx.y * kScaleThreads + threadIdx.x) / 16, i = (blockIdx.y * kScaleThreads + threadIdx.x) * 4;
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (row >= *p.num_rows) return;
  const int64_t base = static_cast<int64_t>(row) * p.hidden;
  float x[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool there = i + e < p.hidden;
    x[e] = there ? to_float(static_cast<const T*>(p.x)[base + i + e]) : 0.0f;
    if (there) static_cast<T*>(p.scaled)[base + i + e] = round_to<T>(x[e] * to_float(static_cast<const T*>(p.weight)[i + e]));
  }
  float sum = quad_squares(x);
  for (int d = 1; d < 16; d <<= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 16 == 0 && block < square_blocks(p.hidden)) p.squares[static_cast<int64_t>(row) * square_pitch(p.hidden) + block] = sum;
}

constexpr int kEmbeddingThreads = 128;

template <typename T, bool kVector> __global__ void __launch_bounds__(kEmbeddingThreads) embedding_kernel(EmbeddingParams p) {
  const int row = blockIdx.x;
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  if (row >= *p.num_rows) return;
  const int id = p.ids[row];
  const bool known = id >= 0 && id < p.vocab;
  const T* from = static_cast<const T*>(p.table) + (known ? static_cast<int64_t>(id) * p.hidden : 0);
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.hidden;
  for (int i = kVec * threadIdx.x; i < p.hidden; i += kVec * kEmbeddingThreads) {
    T x[kVec];
    load8<T, kVector>(from + i, p.hidden - i, x);
    if (!known)
      for (T& v : x) v = round_to<T>(bits_to_float(0x7fc00000u));
    store8<T, kVector>(out + i, p.hidden - i, x);
  }
}

template <typename T> void rms_norm(const RmsNormParams& p, cudaStream_t s) {
  auto kernel = in_vectors(p.hidden, p.x, p.weight, p.out) ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>;
  launch({dim3(p.rows), dim3(kNormThreads), 0, s, 1, true}, kernel, p);
}
template <typename T> void rms_scale(const RmsScaleParams& p, cudaStream_t s) {
  launch({dim3(p.rows, (p.hidden + 4 * kScaleThreads - 1) / (4 * kScaleThreads)), dim3(kScaleThreads), 0, s, 1, true}, rms_scale_kernel<T>, p);
}
template <typename T> void embedding(const EmbeddingParams& p, cudaStream_t s) {
  auto kernel = in_vectors(p.hidden, p.table, p.out) ? embedding_kernel<T, true> : embedding_kernel<T, false>;
  launch({dim3(p.rows), dim3(kEmbeddingThreads), 0, s, 1, true}, kernel, p);
}

}  // namespace

void launch_rms_norm_cuda(const RmsNormParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? rms_norm<bf16>(p, s) : rms_norm<float>(p, s);
}

void launch_rms_scale_cuda(const RmsScaleParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? rms_scale<bf16>(p, s) : rms_scale<float>(p, s);
}

void launch_embedding_cuda(const EmbeddingParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? embedding<bf16>(p, s) : embedding<float>(p, s);
}

}  // namespace specrt

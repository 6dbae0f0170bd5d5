// RMSNorm and embedding. Row-wise, memory- and latency-bound: a block a row (norm) or a part of one, in the pieces of row.cuh. Rows past *num_rows exit. Bytes: each row is read once and written once. All start while the kernel before them
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

constexpr int kEmbeddingThreads = 256;

// A thread eight columns, eight threads a block of the sums.
template <typename T, bool kVector> __global__ void __launch_bounds__(kEmbeddingThreads) embedding_kernel(EmbeddingParams p) {
  const int row = blockIdx.x, h = p.hidden, i = (blockIdx.y * kEmbeddingThreads + threadIdx.x) * kVec, block = i / kSquareBlock;
  ptx::launch_dependents();
  T x[kVec] = {}, scaled[kVec] = {};
  if (i < h) load8<T, kVector>(static_cast<const T*>(p.weight) + i, h - i, scaled);
  if (!p.early) ptx::grid_dependency_wait();
  const int rows = __ldcg(p.num_rows), id = __ldcg(p.ids + row);
  if (row < rows) {
    const bool known = id >= 0 && id < p.vocab;
    const int64_t at = static_cast<int64_t>(row) * h + i;
    if (i < h) {
      load8<T, kVector>(static_cast<const T*>(p.table) + (known ? static_cast<int64_t>(id) * h : 0) + i, h - i, x);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (!known && i + e < h) x[e] = round_to<T>(bits_to_float(0x7fc00000u));
        scaled[e] = round_to<T>(to_float(x[e]) * to_float(scaled[e]));
      }
      store8<T, kVector>(static_cast<T*>(p.out) + at, h - i, x);
      store8<T, kVector>(static_cast<T*>(p.scaled) + at, h - i, scaled);
    }
    const float first[4] = {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])}, second[4] = {to_float(x[4]), to_float(x[5]), to_float(x[6]), to_float(x[7])};
    float sum = quad_squares(first) + quad_squares(second);
    for (int d = 1; d < kSquareBlock / kVec; d <<= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
    if (i % kSquareBlock == 0 && block < square_blocks(h)) p.squares[static_cast<int64_t>(row) * square_pitch(h) + block] = sum;
  }
  if (p.early) ptx::grid_dependency_wait();  // who waits for this kernel relies on the one before it too
}

template <typename T> void rms_norm(const RmsNormParams& p, cudaStream_t s) {
  auto kernel = in_vectors(p.hidden, p.x, p.weight, p.out) ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>;
  launch({dim3(p.rows), dim3(kNormThreads), 0, s, 1, true}, kernel, p);
}
template <typename T> void embedding(const EmbeddingParams& p, cudaStream_t s) {
  auto kernel = in_vectors(p.hidden, p.table, p.weight, p.out, p.scaled) ? embedding_kernel<T, true> : embedding_kernel<T, false>;
  launch({dim3(p.rows, (p.hidden + kVec * kEmbeddingThreads - 1) / (kVec * kEmbeddingThreads)), dim3(kEmbeddingThreads), 0, s, 1, true}, kernel, p);
}

}  // namespace

void launch_rms_norm_cuda(const RmsNormParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? rms_norm<bf16>(p, s) : rms_norm<float>(p, s);
}

void launch_embedding_cuda(const EmbeddingParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? embedding<bf16>(p, s) : embedding<float>(p, s);
}

}  // namespace specrt

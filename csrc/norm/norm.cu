// RMSNorm, rms_scale, embedding. Row-wise, memory- and latency-bound: a block a row (norm, embedding), eight elements a thread in 16-byte pieces, or one by
// one where a row does not begin on 16 bytes. Rows past *num_rows exit. Bytes: each row is read once and written once. All start while the kernel before them
// ends, and let the next one start at once.
#include "base/launch.h"
#include "base/math.h"
#include "base/squares.h"
#include "norm/params.h"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kVec = 8;  // elements a thread takes at once

// Eight elements from `from`, of which `count` exist (all of them where kVector); the others are zero.
template <typename T, bool kVector> __device__ __forceinline__ void load8(const T* from, int count, T (&to)[kVec]) {
  if constexpr (kVector) {
    uint4 raw[sizeof(T) / 2];
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(T) / 2); ++k) raw[k] = reinterpret_cast<const uint4*>(from)[k];
    memcpy(to, raw, sizeof(raw));
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) to[e] = e < count ? from[e] : T{};
  }
}

template <typename T, bool kVector> __device__ __forceinline__ void store8(T* to, int count, const T (&from)[kVec]) {
  if constexpr (kVector) {
    uint4 raw[sizeof(T) / 2];
    memcpy(raw, from, sizeof(raw));
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(T) / 2); ++k) reinterpret_cast<uint4*>(to)[k] = raw[k];
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      if (e < count) to[e] = from[e];
  }
}

// The order (params.h) is this layout: lane 8t + e of 2048 is element e of thread t's eight.
constexpr int kNormThreads = kNormLanes / kVec, kHeld = 4;  // pieces of a row that a thread keeps between the two passes: 8192 elements a block

__device__ __forceinline__ float fold8(const float (&x)[8]) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

template <typename T, bool kVector> __global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(RmsNormParams p) {
  __shared__ float warp_sum[kNormThreads / 32];
  static_assert(kNormThreads / 32 == 8, "fold8 folds the warps");
  const int row = blockIdx.x, first = kVec * threadIdx.x;
  const T* weight = static_cast<const T*>(p.weight);
  T held[kHeld][kVec], scale[kHeld][kVec];
  float lane[kVec] = {};
  ptx::launch_dependents();
#pragma unroll
  for (int g = 0; g < kHeld; ++g) {
    const int i = first + g * kNormLanes;
    if (i < p.hidden) load8<T, kVector>(weight + i, p.hidden - i, scale[g]);
  }
  ptx::grid_dependency_wait();
  if (row >= *p.num_rows) return;
  const int64_t base = static_cast<int64_t>(row) * p.hidden;
  const T* x = static_cast<const T*>(p.x) + base;
  T* out = static_cast<T*>(p.out) + base;

  const auto add = [&](const T (&h)[kVec]) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) lane[e] = fma_rn(to_float(h[e]), to_float(h[e]), lane[e]);
  };
  const auto write = [&](int i, const T (&h)[kVec], const T (&w)[kVec], float r) {
    T y[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) y[e] = round_to<T>(to_float(round_to<T>(to_float(h[e]) * r)) * to_float(w[e]));
    store8<T, kVector>(out + i, p.hidden - i, y);
  };

#pragma unroll
  for (int g = 0; g < kHeld; ++g) {
    const int i = first + g * kNormLanes;
    if (i >= p.hidden) break;
    load8<T, kVector>(x + i, p.hidden - i, held[g]);
  }
#pragma unroll
  for (int g = 0; g < kHeld; ++g) {
    if (first + g * kNormLanes >= p.hidden) break;
    add(held[g]);
  }
  for (int i = first + kHeld * kNormLanes; i < p.hidden; i += kNormLanes) {
    T h[kVec];
    load8<T, kVector>(x + i, p.hidden - i, h);
    add(h);
  }
  float sum = fold8(lane);
  for (int d = 1; d < 32; d <<= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  const float r = 1.0f / sqrtf(fold8(warp_sum) / static_cast<float>(p.hidden) + p.eps);
#pragma unroll
  for (int g = 0; g < kHeld; ++g) {
    const int i = first + g * kNormLanes;
    if (i >= p.hidden) break;
    write(i, held[g], scale[g], r);
  }
  for (int i = first + kHeld * kNormLanes; i < p.hidden; i += kNormLanes) {
    T h[kVec], w[kVec];
    load8<T, kVector>(x + i, p.hidden - i, h);
    load8<T, kVector>(weight + i, p.hidden - i, w);
    write(i, h, w, r);
  }
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

// Whether rows of `width` elements can be read and written in 16-byte pieces.
template <typename... Pointers> bool in_vectors(int width, const Pointers*... pointers) {
  return width % kVec == 0 && (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
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

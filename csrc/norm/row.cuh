// A row of RMSNorm by one block, in pieces of eight elements: 16 bytes at a time, or one by one where a row does not begin on 16 bytes.
#pragma once
#include "base/math.h"
#include "norm/params.h"

namespace specrt {

constexpr int kVec = 8;  // elements a thread takes at once

template <bool kPast> __device__ __forceinline__ float load_element(const float* from) { return kPast ? __ldcg(from) : *from; }
template <bool kPast> __device__ __forceinline__ bf16 load_element(const bf16* from) {
  return kPast ? bf16{__ldcg(reinterpret_cast<const unsigned short*>(from))} : *from;
}

// Eight elements from `from`, of which `count` exist (all of them where kVector); the others are zero. kPast: past the L1, which may hold what was (ptx/dependency.cuh).
template <typename T, bool kVector, bool kPast = false> __device__ __forceinline__ void load8(const T* from, int count, T (&to)[kVec]) {
  if constexpr (kVector) {
    uint4 raw[sizeof(T) / 2];
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(T) / 2); ++k) raw[k] = kPast ? __ldcg(reinterpret_cast<const uint4*>(from) + k) : reinterpret_cast<const uint4*>(from)[k];
    memcpy(to, raw, sizeof(raw));
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) to[e] = e < count ? load_element<kPast>(from + e) : T{};
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


// The first pieces of a norm's weight, or nothing of no norm (null): they may be read before anything else is known.
template <typename T, bool kVector> struct RowWeight {
  const T* all;
  T first[kHeld][kVec];

  __device__ RowWeight(const T* weight, int hidden) : all(weight) {
#pragma unroll
    for (int g = 0; g < kHeld; ++g) {
      const int i = kVec * threadIdx.x + g * kNormLanes;
      if (weight && i < hidden) load8<T, kVector>(weight + i, hidden - i, first[g]);
    }
  }
};

// The norm of x, by all kNormThreads of the block: write(i, eight elements of it from i on).
template <typename T, bool kVector, typename Write> __device__ __forceinline__ void norm_row(const T* x, const RowWeight<T, kVector>& weight, int hidden, float eps, Write&& write) {
  __shared__ float warp_sum[kNormThreads / 32];
  static_assert(kNormThreads / 32 == 8, "fold8 folds the warps");
  const int first = kVec * threadIdx.x;
  T held[kHeld][kVec];
  float lane[kVec] = {};
  const auto add = [&](const T (&h)[kVec]) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) lane[e] = fma_rn(to_float(h[e]), to_float(h[e]), lane[e]);
  };
  const auto finish = [&](int i, const T (&h)[kVec], const T (&w)[kVec], float r) {
    T y[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) y[e] = round_to<T>(to_float(round_to<T>(to_float(h[e]) * r)) * to_float(w[e]));
    write(i, y);
  };

#pragma unroll
  for (int g = 0; g < kHeld; ++g) {
    const int i = first + g * kNormLanes;
    if (i >= hidden) break;
    load8<T, kVector, true>(x + i, hidden - i, held[g]);
  }
#pragma unroll
  for (int g = 0; g < kHeld; ++g) {
    if (first + g * kNormLanes >= hidden) break;
    add(held[g]);
  }
  for (int i = first + kHeld * kNormLanes; i < hidden; i += kNormLanes) {
    T h[kVec];
    load8<T, kVector, true>(x + i, hidden - i, h);
    add(h);
  }
  float sum = fold8(lane);
  for (int d = 1; d < 32; d <<= 1) sum = sum + __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  const float r = 1.0f / sqrtf(fold8(warp_sum) / static_cast<float>(hidden) + eps);
#pragma unroll
  for (int g = 0; g < kHeld; ++g) {
    const int i = first + g * kNormLanes;
    if (i >= hidden) break;
    finish(i, held[g], weight.first[g], r);
  }
  for (int i = first + kHeld * kNormLanes; i < hidden; i += kNormLanes) {
    T h[kVec], w[kVec];
    load8<T, kVector, true>(x + i, hidden - i, h);
    load8<T, kVector>(weight.all + i, hidden - i, w);
    finish(i, h, w, r);
  }
}

// Whether rows of `width` elements can be read and written in 16-byte pieces.
template <typename... Pointers> bool in_vectors(int width, const Pointers*... pointers) {
  return width % kVec == 0 && (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

}  // namespace specrt

// What the linear kernels on warpgroup tensor cores share: the sizes of their pipelines, and the store of a fragment.
#pragma once
#include "base/check.h"
#include "base/types.h"

namespace specrt {

constexpr int kUnitBytes = 64 * 128;  // of packed weights: 64 outputs x 128 bytes of k, swizzled as the tensor cores read them

// Shared memory of a CTA. An SM has 228 KiB; every CTA takes 1 KiB more than it asks for. Of few rows: so much that no SM holds two, and every SM that is free one. (Two sizes, of which one of
// each fits an SM, so that neighbours overlap there: a decode step of the 8B shape 5.55 ms instead of 5.36, since two of the smaller fit too.) More gains nothing further there, and leaves
// attention, which comes up meanwhile, no room: the 1B shape 1.12 ms, with 180000 1.19; of 64 rows a little less serves best.
constexpr int kWholeBytes = 227 << 10;
constexpr int few_bytes(int tokens) { return tokens > 32 ? 140000 : 160000; }
static_assert(2 * (few_bytes(64) + (1 << 10)) > 228 << 10, "not two an SM");

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Refuses any but Hopper's instruction set, naming the op.
inline void require_hopper(const char* op, const char* dtype) {
  int card = 0, major = 0;
  SPECRT_CUDA_CHECK(cudaGetDevice(&card));
  SPECRT_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, card));
  if (major != 9) fail(std::string(op) + ": " + dtype + " on CUDA needs a Hopper GPU (compute capability 9.0), got " + std::to_string(major) + ".x; use device=\"cpu\"");
}

// Four neighbouring outputs of one token, as a warp writes them: whole sectors of 32 bytes or more.
struct Quad {
  int token, output;
  float value[4];
};

// Of the thread's fragment d (ptx/wgmma.cuh) of 8 tokens from `token` x 64 outputs of a warpgroup from `output`: neighbours swap tokens (pairs of outputs) and pairs swap
// halves (fours of outputs).
__device__ __forceinline__ Quad quad_place(int token, int output) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  return {token + 2 * (lane % 4) + (g & 1), output + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + (g & 4) + (g & 2) * 4, {}};
}
__device__ __forceinline__ Quad quad_of(int token, int output, const float (&d)[4]) {
  const int g = threadIdx.x % 32 / 4;
  const bool odd = g & 1, upper = g & 2;
  Quad quad = quad_place(token, output);
  float pairs[2][2];  // [half][output] of one token
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float other = __shfl_xor_sync(0xffffffffu, odd ? d[2 * half] : d[2 * half + 1], 4);
    pairs[half][0] = odd ? other : d[2 * half];
    pairs[half][1] = odd ? d[2 * half + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, upper ? pairs[0][i] : pairs[1][i], 8);
    quad.value[i] = upper ? other : pairs[0][i];
    quad.value[2 + i] = upper ? pairs[1][i] : other;
  }
  return quad;
}

// Four values as one load or store.
template <typename T> union Packed;
template <> union Packed<bf16> {
  bf16 each[4];
  uint2 all;
};
template <> union Packed<float> {
  float each[4];
  float4 all;
};

// Of two ranges' sums: either order is the same sum.
__device__ __forceinline__ void add_four(float* sum, const float4& other) {
  sum[0] = sum[0] + other.x;
  sum[1] = sum[1] + other.y;
  sum[2] = sum[2] + other.z;
  sum[3] = sum[3] + other.w;
}

__device__ __forceinline__ void store_quad(void* out, DType dtype, int out_features, int rows, const Quad& quad) {
  if (quad.token >= rows || quad.output >= out_features) return;
  const int64_t at = static_cast<int64_t>(quad.token) * out_features + quad.output;
  const float(&x)[4] = quad.value;
  if (out_features % 4 == 0) {
    if (dtype == DType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(out) + at) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      const Packed<bf16> pack{{to_bf16(x[0]), to_bf16(x[1]), to_bf16(x[2]), to_bf16(x[3])}};
      *reinterpret_cast<uint2*>(static_cast<bf16*>(out) + at) = pack.all;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (quad.output + i >= out_features) continue;
      if (dtype == DType::kF32) static_cast<float*>(out)[at + i] = x[i];
      else static_cast<bf16*>(out)[at + i] = to_bf16(x[i]);
    }
  }
}

}  // namespace specrt

// What a row sees, and the fold of partial results: shared by all attention kernels.
#pragma once
#include "attention/params.h"
#include "base/check.h"
#include "base/math.h"
#include "ptx/convert.cuh"

namespace specrt {

struct Row {
  int prefix = 0, len = 0, first = 0;  // visible: logical positions first .. len-1

  // The visible positions of [begin, begin + size) are [low, high), relative to begin; none where high <= low.
  __device__ int low(int begin) const { return max(0, first - begin); }
  __device__ int high(int begin, int size) const { return min(size, len - begin); }
  __device__ bool sees(int begin, int size) const { return low(begin) < high(begin, size); }
};

// How many of a path's first `depth` nodes there are, and the last of them: from L2, by loads that do not wait for each other.
__device__ __forceinline__ int path_length(const int32_t* path, int depth, int& last) {
  constexpr int kTogether = 8;
  int length = 0;
  bool goes_on = true;
  for (int begin = 0; begin < depth; begin += kTogether) {
    int nodes[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) nodes[i] = begin + i < depth ? __ldcg(path + begin + i) : -1;
#pragma unroll
    for (int node : nodes) {
      goes_on = goes_on && node >= 0;
      length += goes_on;
      if (goes_on) last = node;
    }
  }
  return length;
}

// The two factors of a fold (params.h); m becomes the new maximum.
struct FoldFactors {
  float kept, added;
};
__device__ __forceinline__ FoldFactors fold_factors(float& m, float m2) {
  const float top = m2 > m ? m2 : m;
  const FoldFactors f{ptx::ex2(m - top), ptx::ex2(m2 - top)};
  m = top;
  return f;
}
__device__ __forceinline__ float fold_value(float x, float x2, FoldFactors f) { return fma_rn(x2, f.added, x * f.kept); }

#define SPECRT_MINUS_INF __int_as_float(0xff800000)

// A head's (m, l, O) spread over a warp: element lane + 32 i in o[i].
template <int N> struct WarpState {
  float m, l, o[N];
  __device__ void reset() {
    m = SPECRT_MINUS_INF;
    l = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] = 0.0f;
  }
  __device__ void fold(const WarpState& s) {
    const FoldFactors f = fold_factors(m, s.m);
    l = fold_value(l, s.l, f);
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] = fold_value(o[i], s.o[i], f);
  }
};

// bf16 on CUDA: throws where there is no Hopper GPU.
inline void require_hopper(const char* op) {
  int card = 0, major = 0;
  SPECRT_CUDA_CHECK(cudaGetDevice(&card));
  SPECRT_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, card));
  if (major != 9)
    fail(std::string(op) + ": bfloat16 on CUDA needs a Hopper GPU (compute capability 9.0), got " + std::to_string(major) + ".x; use device=\"cpu\" or dtype=\"float32\"");
}

// float32 tensors: both ops (rows_f32.cu).
void launch_attention_f32(const AttentionParams& p, void* stream);

}  // namespace specrt

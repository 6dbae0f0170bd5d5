// What follows a tile's sums (params.h, Finish), for kernels whose warpgroups hold 64 outputs x some tokens in fragments of 8 tokens: scale by the row's 1 / rms, bias, then
// store, SiLU-mul, or residual add with the next norm's statistics. Extra warps make the rows' 1 / rms while the others still multiply.
#pragma once
#include <type_traits>

#include "base/math.h"
#include "gemm/params.h"
#include "gemm/tile.cuh"
#include "ptx/convert.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/prefetch.cuh"

namespace specrt {

// In shared memory behind a kernel's pipeline.
template <int warpgroups, int tokens> struct EpilogueShared {
  float scale[tokens];                    // 1 / rms of the tile's tokens
  float squares[warpgroups][4][tokens];   // a warp's part (16 outputs) of each token's sum of squares
  alignas(16) uint64_t full, empty;       // of `scale`: made (by every lane of the warps that make it), read
};

// f(j, fragment j) for all of a thread's fragments, one after the other, kTogether of them written out: between the rounds of a loop the values move down, as registers have no index.
// Code behind the main loop is cold in the instruction cache at every launch (the weights between two launches displace it even from L2), so few rows' must be short, one fragment: written
// out for each of the fragments of 64 tokens it cost 10 us a kernel. Where rows are many the moves count, 4k of them a tile of 256 tokens, and few instructions a fragment (staged.cuh).
template <int kTogether, int N, typename F> __device__ __forceinline__ void for_each_fragment(float (&value)[N], F&& f) {
  static_assert(N % (4 * kTogether) == 0, "whole rounds");
#pragma unroll 1
  for (int first = 0; first < N / 4; first += kTogether) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      float d[4] = {value[4 * k], value[4 * k + 1], value[4 * k + 2], value[4 * k + 3]};
      f(first + k, d);
    }
#pragma unroll
    for (int i = 0; i + 4 * kTogether < N; ++i) value[i] = value[i + 4 * kTogether];
  }
}

// 1 / rms of the tokens first_row + [begin, end), by one warp: eight rows at a time, four lanes each. Lane q of the four has what base/squares.h calls lanes q, q + 4, ... of a row, and
// so folds (16, 8, 4) its own and (2, 1) with its neighbours. kLoads (of 16 bytes) of a lane at once: four, or fewer where registers are few.
template <int kLoads> __device__ __forceinline__ void make_scales(const LinearParams& p, float* scale, int first_row, int begin, int end, int rows) {
  const int lane = threadIdx.x % 32, q = lane % 4, blocks = square_blocks(p.in_features), pitch = square_pitch(p.in_features);
  end = min(end, rows - first_row);
#pragma unroll 1
  for (int row = begin + lane / 4; row - lane / 4 < end; row += 8) {
    const float* squares = p.squares + static_cast<int64_t>(first_row + min(row, end - 1)) * pitch;
    float sum[4] = {};
#pragma unroll 1
    for (int half = 0; half < 128 && half < blocks; half += 64) {  // lanes from 0 and from 16 on
      float each[4] = {};
#pragma unroll 1
      for (int base = half + 4 * q; base < blocks; base += 128) {
#pragma unroll
        for (int at = 0; at < 4; at += kLoads) {
          float4 x[kLoads];
#pragma unroll
          for (int i = 0; i < kLoads; ++i)
            if (base + 16 * (at + i) < blocks) x[i] = *reinterpret_cast<const float4*>(squares + base + 16 * (at + i));
#pragma unroll
          for (int i = 0; i < kLoads; ++i) {
            const float four[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (base + 16 * (at + i) + e < blocks) each[at + i] = each[at + i] + four[e];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = sum[i] + each[i];
    }
    float all = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    all = all + __shfl_xor_sync(0xffffffffu, all, 2);
    all = all + __shfl_xor_sync(0xffffffffu, all, 1);
    if (q == 0 && row < end) scale[row] = row_scale(all, p.in_features, p.eps);
  }
}

// What an extra warp does for a CTA that takes the tiles walk_of(rows) (walk.cuh), `outputs` wide and the first from first_output, rows from `base` on: 1 / rms of the tokens [begin, end) of
// each, and what the epilogue reads from memory, asked for early. T: of next_weight.
template <typename T, int kLoads, typename Shared, typename WalkOf>
__device__ __forceinline__ void assist(const LinearParams& p, Shared& shared, int first_output, int outputs, WalkOf&& walk_of, int base, int begin, int end) {
  constexpr int tokens = sizeof(shared.scale) / sizeof(float), sector = 32 / sizeof(T);
  const int lane = threadIdx.x % 32;
  if (p.next_weight) {  // nobody has read it before
    const int output = first_output + sector * lane;
    if (sector * lane < outputs && output < p.out_features) ptx::prefetch_l2(static_cast<const T*>(p.next_weight) + output);
  }
  if (!p.squares) return;
  ptx::grid_dependency_wait();
  const int rows = min(*p.num_rows, p.rows);
  const auto walk = walk_of(rows);
  int parity = 1, made = -1;  // made: for which rows
  for (int tile = walk.first; tile < walk.end; tile += walk.step) {
    const int first_row = base + tile % walk.blocks * tokens;
    ptx::mbarrier_wait(ptx::shared_address(&shared.empty), parity);
    if (first_row != made) make_scales<kLoads>(p, shared.scale, first_row, begin, end, rows);
    made = first_row;
    ptx::mbarrier_arrive(ptx::shared_address(&shared.full));  // by every lane, for what it has written
    parity ^= 1;
  }
}

// SiLU of the gate rounded to T, rounded to T. In bfloat16 the approximate reciprocal gives the bits of the division for every gate there is (test_linear_finish.py goes through all 65536).
template <typename T> __device__ __forceinline__ float rounded_silu(float gate) {
  gate = to_float(round_to<T>(gate));
  const float d = 1.0f + exp_rn(-gate);
  if constexpr (std::is_same_v<T, bf16>) return to_float(to_bf16(gate * ptx::reciprocal(d)));
  return to_float(round_to<T>(gate / d));
}

// Channels of the kSilu output: a warp's 16 rows are gate and up of 8 channels, and a thread has both of one channel for two tokens. Neighbours swap tokens, so that a thread
// stores two channels of one.
template <typename T> __device__ __forceinline__ void store_silu(const LinearParams& p, int token, int rows, int output, const float (&d)[4]) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  const bool odd = g & 1;
  float y[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float up = to_float(round_to<T>(d[2 + i]));
    y[i] = rounded_silu<T>(d[i]) * up;
  }
  const float other = __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 4);
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  token += 2 * (lane % 4) + odd;
  const int width = p.out_features / 2, channel = output / 2 + static_cast<int>(threadIdx.x) % 128 / 32 * 8 + (g & 6);
  if (token >= rows || channel >= width) return;
  *reinterpret_cast<Pair*>(static_cast<T*>(p.out) + static_cast<int64_t>(token) * width + channel) = {round_to<T>(odd ? other : y[0]), round_to<T>(odd ? y[1] : other)};
}

// The epilogue of a thread: what it reads ahead of its use, and the finish of a fragment. T: the activations' type; Bias: the bias's.
template <typename Shared, typename T = bf16, typename Bias = T> struct Epilogue {
  using Four = decltype(Packed<T>::all);
  const LinearParams& p;
  Shared& shared;
  int warpgroup, first_row, rows, output;  // of the tile and of this warpgroup
  Four weight;                             // next_weight at this thread's quads

  __device__ Epilogue(const LinearParams& p_, Shared& shared_, int warpgroup_, int first_row_, int rows_, int output_)
      : p(p_), shared(shared_), warpgroup(warpgroup_), first_row(first_row_), rows(rows_), output(output_), weight{} {
    const Quad at = quad_place(0, output);
    if (p.next_weight && at.output < p.out_features) weight = __ldg(reinterpret_cast<const Four*>(static_cast<const T*>(p.next_weight) + at.output));
  }

  // The residual stream at this thread's quad of the fragment at token `at` of the tile.
  __device__ Four residual(int at) const {
    const Quad quad = quad_place(first_row + at, output);
    if (p.finish != Finish::kResidual || quad.token >= rows || quad.output >= p.out_features) return Four{};
    return *reinterpret_cast<const Four*>(static_cast<const T*>(p.residual) + static_cast<int64_t>(quad.token) * p.out_features + quad.output);
  }

  // The thread's fragment d of the 8 tokens from `at` of the tile; stream: residual(at).
  __device__ void finish(int at, float (&d)[4], Four stream) const {
    const int lane = threadIdx.x % 32;
    if (p.squares) {
      const float2 r = *reinterpret_cast<const float2*>(shared.scale + at + 2 * (lane % 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) d[e] = d[e] * (e & 1 ? r.y : r.x);
    }
    if (p.bias) {
      const int own = output + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float bias = to_float(static_cast<const Bias*>(p.bias)[min(own + 8 * half, p.out_features - 1)]);
        d[2 * half] = d[2 * half] + bias;
        d[2 * half + 1] = d[2 * half + 1] + bias;
      }
    }
    if (p.finish == Finish::kSilu) return store_silu<T>(p, first_row + at, rows, output, d);
    const Quad quad = quad_of(first_row + at, output, d);
    if (p.finish == Finish::kStore) return store_quad(p.out, p.out_dtype, p.out_features, rows, quad);
    const Packed<T> before{.all = stream}, factor{.all = weight};
    const bool valid = quad.token < rows && quad.output < p.out_features;
    const int64_t place = static_cast<int64_t>(quad.token) * p.out_features + quad.output;
    Packed<T> h, scaled;
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      h.each[e] = round_to<T>(to_float(before.each[e]) + to_float(round_to<T>(quad.value[e])));
      x[e] = valid ? to_float(h.each[e]) : 0.0f;
      scaled.each[e] = round_to<T>(x[e] * to_float(factor.each[e]));
    }
    if (valid) *reinterpret_cast<Four*>(static_cast<T*>(p.residual_out) + place) = h.all;
    if (!p.next_weight) return;
    if (valid) *reinterpret_cast<Four*>(static_cast<T*>(p.scaled) + place) = scaled.all;
    float sum = quad_squares(x);
    sum = sum + __shfl_xor_sync(0xffffffffu, sum, 16);
    sum = sum + __shfl_xor_sync(0xffffffffu, sum, 8);
    if (lane < 8) shared.squares[warpgroup][threadIdx.x % 128 / 32][quad.token - first_row] = sum;
  }

  // After the last fragment of the tokens begin .. end of the tile, by the whole warpgroup: their sums of squares.
  __device__ void finish_squares(int begin, int end) const {
    if (p.finish != Finish::kResidual || !p.next_weight) return;
    ptx::named_barrier(1 + warpgroup, 128);
    const float(&part)[4][sizeof(shared.scale) / 4] = shared.squares[warpgroup];
#pragma unroll 1
    for (int t = begin + static_cast<int>(threadIdx.x) % 128; t < min(end, rows - first_row); t += 128)
      if (output < p.out_features)
        p.next_squares[static_cast<int64_t>(first_row + t) * square_pitch(p.out_features) + output / 64] = (part[0][t] + part[1][t]) + (part[2][t] + part[3][t]);
    ptx::named_barrier(1 + warpgroup, 128);  // a further tile may write its parts
  }
};

}  // namespace specrt

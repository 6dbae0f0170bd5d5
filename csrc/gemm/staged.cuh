// What follows a tile's sums (params.h, Finish) where rows are more than a few: as epilogue.cuh has it, to the same bits, but by way of shared memory. A warpgroup lays its sums there as
// rows of its 64 outputs, some tokens at a time, and takes them up again in pieces of 16 bytes, so that whole lines go to memory and few instructions bring them there. Nothing is multiplied
// meanwhile: of a tile of 128 outputs x 256 tokens 7 to 9 us before, 2 so.
#pragma once
#include "gemm/epilogue.cuh"
#include "ptx/convert.cuh"

namespace specrt {

// In shared memory behind a kernel's pipeline.
template <int warpgroups, int tokens, int buffers_ = 2> struct StagedShared {
  float scale[tokens];                       // 1 / rms of the tile's tokens
  alignas(16) uint64_t full, empty;          // of `scale`: made, read
  // 32 rows of bfloat16 or 16 of float32, padded by 16 bytes: eight rows lie in different banks. Twice where there is room, so that one barrier a round suffices.
  static constexpr int buffers = buffers_;
  alignas(16) char rows[warpgroups][buffers][32 * (64 * 2 + 16)];
};

// Activations in bfloat16; Bias: the bias's type.
template <typename Shared, typename Bias = bf16, bool kAhead = true> struct StagedEpilogue {
  const LinearParams& p;
  Shared& shared;
  int warpgroup, first_row, rows, output;  // of the tile and of this warpgroup

  // The thread's fragments of the tokens from `begin` of the tile on, by the whole warpgroup.
  template <int N> __device__ __forceinline__ void finish(int begin, float (&value)[N]) const {
    const int lane = threadIdx.x % 32;
    if (p.squares) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float2 r = *reinterpret_cast<const float2*>(shared.scale + begin + 2 * i + 2 * (lane % 4));
#pragma unroll
        for (int e = 0; e < 4; ++e) value[i + e] = value[i + e] * (e & 1 ? r.y : r.x);
      }
    }
    if (p.bias) {
      const int own = output + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float bias = to_float(static_cast<const Bias*>(p.bias)[min(own + 8 * half, p.out_features - 1)]);
#pragma unroll
        for (int i = 0; i < N; i += 4) {
          value[i + 2 * half] = value[i + 2 * half] + bias;
          value[i + 2 * half + 1] = value[i + 2 * half + 1] + bias;
        }
      }
    }
    if (p.finish == Finish::kSilu) pass<Finish::kSilu, bf16>(begin, value);
    else if (p.finish == Finish::kResidual) pass<Finish::kResidual, bf16>(begin, value);
    else if (p.out_dtype == DType::kF32) pass<Finish::kStore, float>(begin, value);
    else pass<Finish::kStore, bf16>(begin, value);
  }

 private:
  // kSilu: gate and up of one channel for two tokens, in the fragment d.
  static __device__ __forceinline__ uint32_t silu(const float* d) {
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float up = to_float(to_bf16(d[2 + i]));
      y[i] = rounded_silu<bf16>(d[i]) * up;
    }
    return ptx::pack_bf16(y[0], y[1]);
  }

  // Two fragments, of the 16 tokens from the row at `to` on, as rows.
  template <Finish kFinish, typename Out> static __device__ __forceinline__ void lay(char* to, const float* d, int thread) {
    constexpr int outputs = kFinish == Finish::kSilu ? 32 : 64, pitch = outputs * sizeof(Out) + 16;
    const int lane = thread % 32, warp = thread % 128 / 32;
    if constexpr (sizeof(Out) == 4) {
      float* at = reinterpret_cast<float*>(to + 2 * (lane % 4) * pitch) + 16 * warp + lane / 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) at[(8 * (i / 4) + i % 2) * (pitch / 4) + 8 * (i / 2 % 2)] = d[i];
    } else if constexpr (kFinish == Finish::kSilu) {
      ptx::stmatrix_x2_trans(ptx::shared_address(to + lane % 16 * pitch + warp * 16), silu(d), silu(d + 4));
    } else {
      const uint32_t at = ptx::shared_address(to + (lane / 16 * 8 + lane % 8) * pitch + (2 * warp + lane / 8 % 2) * 16);
      ptx::stmatrix_x4_trans(at, ptx::pack_bf16(d[0], d[1]), ptx::pack_bf16(d[2], d[3]), ptx::pack_bf16(d[4], d[5]), ptx::pack_bf16(d[6], d[7]));
    }
  }

  // The residual stream at the 8 outputs from `column` of a row. N % 4 == 0 only: two halves.
  struct Piece {
    Packed<bf16> half[2];
  };
  __device__ __forceinline__ Piece residual(int row, int column) const {
    Piece piece{};
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (row < rows && column + 4 * h < p.out_features)
        piece.half[h].all = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(p.residual) + static_cast<int64_t>(row) * p.out_features + column + 4 * h);
    return piece;
  }
  __device__ __forceinline__ void add(int row, int column, const Piece& before, const Piece& sum) const {
    float squares = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool valid = row < rows && column + 4 * h < p.out_features;
      const int64_t place = static_cast<int64_t>(row) * p.out_features + column + 4 * h;
      Packed<bf16> stream, scaled, factor{};
      if (valid && p.next_weight) factor.all = __ldg(reinterpret_cast<const uint2*>(static_cast<const bf16*>(p.next_weight) + column + 4 * h));
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        stream.each[e] = to_bf16(to_float(before.half[h].each[e]) + to_float(sum.half[h].each[e]));
        x[e] = valid ? to_float(stream.each[e]) : 0.0f;
        scaled.each[e] = to_bf16(x[e] * to_float(factor.each[e]));
      }
      if (valid) *reinterpret_cast<uint2*>(static_cast<bf16*>(p.residual_out) + place) = stream.all;
      if (valid && p.next_weight) *reinterpret_cast<uint2*>(static_cast<bf16*>(p.scaled) + place) = scaled.all;
      squares = h ? squares + quad_squares(x) : quad_squares(x);
    }
    if (!p.next_weight) return;
#pragma unroll
    for (int d = 1; d < 8; d *= 2) squares = squares + __shfl_xor_sync(0xffffffffu, squares, d);
    if (threadIdx.x % 8 == 0 && row < rows && output < p.out_features) p.next_squares[static_cast<int64_t>(row) * square_pitch(p.out_features) + output / 64] = squares;
  }

  template <Finish kFinish, typename Out, int N> __device__ __forceinline__ void pass(int begin, const float (&value)[N]) const {
    constexpr int outputs = kFinish == Finish::kSilu ? 32 : 64, pitch = outputs * sizeof(Out) + 16, each = 16 / sizeof(Out), pieces = outputs / each;  // of a row
    constexpr int tokens = sizeof(Out) == 4 ? 16 : 32, at_once = 128 / pieces, rounds = tokens / at_once;
    static_assert(N % 8 == 0, "two fragments at a time");
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));  // read anew: the compiler would make the places of every way out before the main loop, and spill them
    const int line = thread % 128 / pieces, part = thread % pieces;
    const int features = kFinish == Finish::kSilu ? p.out_features / 2 : p.out_features, column = (kFinish == Finish::kSilu ? output / 2 : output) + part * each;
    constexpr int ahead = kAhead ? tokens : 0;  // the residual stream is asked for a round before its use, where there are registers for it
    Piece next[rounds];
    auto ask = [&](int first) {
#pragma unroll
      for (int r = 0; r < rounds; ++r) next[r] = residual(first_row + begin + first + r * at_once + line, column);
    };
    if constexpr (kFinish == Finish::kResidual && ahead > 0) ask(0);
    ptx::named_barrier(1 + warpgroup, 128);  // the rows of the tile before have been taken up
    constexpr int turns = (2 * N + tokens - 1) / tokens;
    // Where few turns of a single tile follow, what they have in common is there once: code that runs once is fetched from L2 first (32 requests x 5 nodes: a round of 8.41 ms is 8.27 so).
    constexpr int unrolled = N <= 40 ? 1 : turns;
#pragma unroll unrolled
    for (int turn = 0; turn < turns; ++turn) {
      const int first = turn * tokens;  // tokens from `begin` on
      if (first_row + begin + first >= rows) break;
      char* const buffer = shared.rows[warpgroup][turn % Shared::buffers];
      if (Shared::buffers == 1 && turn > 0) ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
      for (int t = 0; t < turns; ++t)
        if (t == turn)
#pragma unroll
          for (int k = 0; k < tokens && t * tokens + k < 2 * N; k += 16) lay<kFinish, Out>(buffer + k * pitch, value + (t * tokens + k) / 2, thread);
      if (kFinish == Finish::kResidual && ahead == 0) ask(first);
      Piece before[rounds];
#pragma unroll
      for (int r = 0; r < rounds; ++r) before[r] = next[r];
      if (kFinish == Finish::kResidual && ahead > 0 && first + ahead < 2 * N) ask(first + ahead);
      ptx::named_barrier(1 + warpgroup, 128);
#pragma unroll
      for (int r = 0; r < rounds; ++r) {
        const int token = first + r * at_once + line, row = token < 2 * N ? first_row + begin + token : rows;
        const char* from = buffer + (r * at_once + line) * pitch + part * 16;
        if constexpr (kFinish == Finish::kResidual) {
          add(row, column, before[r], *reinterpret_cast<const Piece*>(from));
        } else if (row < rows && column < features) {
          Out* to = static_cast<Out*>(p.out) + static_cast<int64_t>(row) * features + column;
          if (features % each == 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
          else
#pragma unroll 1
            for (int e = 0; e < min(each, features - column); ++e) to[e] = reinterpret_cast<const Out*>(from)[e];
        }
      }
    }
  }
};

}  // namespace specrt

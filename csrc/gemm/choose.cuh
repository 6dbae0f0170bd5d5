// What follows the sums of lm_head where nobody wants its logits (params.h, Finish::kChoose): of each row and block of 128 outputs, the best score and the statistics. A warp
// takes a row's block, a lane four outputs of it, which is the order of the sampler's own log-sum-exp and what one noise counter gives.
#pragma once
#include "gemm/epilogue.cuh"
#include "ptx/shared.cuh"

namespace specrt {

// How a row is to be chosen, and the noise words of this lane's four outputs from first_output + 4 * lane on: made while the sums are on their way.
struct Draw {
  RowChoice how;
  uint32_t words[4];

  __device__ __forceinline__ Draw(const RowChoice& how_, int first_output) : how(how_), words{} {
    if (how.temperature > 0.0f) noise_words(how.seed, how.position, kNoiseShared, first_output / 4 + static_cast<int>(threadIdx.x) % 32, words);
  }
};

// By a whole warp: z4, the sums of a lane's four outputs. bound: a score that the row has reached in blocks before this one; raised.
__device__ __forceinline__ void choose_block(const LinearParams& p, const Draw& draw, float& bound, int row, int first_output, float4 z4) {
  constexpr unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % 32, first = first_output + 4 * lane;
  const int64_t at = static_cast<int64_t>(row) * ((p.out_features + kLseBlock - 1) / kLseBlock) + first_output / kLseBlock;
  float z[4] = {z4.x, z4.y, z4.z, z4.w};
  bool finite = true;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool there = first + e < p.out_features;
    finite = finite && (!there || finite_bits(float_to_bits(z[e])));
    z[e] = there ? z[e] : -infinity();
  }
  const float temperature = draw.how.temperature;
  if (temperature > 0.0f && temperature != 1.0f) {
    const Divide divide(temperature);
    divide(z);
  }
  const float high = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
  constexpr uint32_t bad = 0xffffffffu;  // above every number's key
  uint32_t key = finite ? order_key(high) : bad, top = __reduce_max_sync(all, key);
  if (top == bad) {
    if (lane == 0) p.choice[at] = {kBadRank, 0.0f, 0.0f};
    return;
  }
  const float max = key_value(top);
  const int e_high = z[0] == high ? 0 : z[1] == high ? 1 : z[2] == high ? 2 : 3;
  float best = high, own = e_high == 0 ? z[0] : e_high == 1 ? z[1] : e_high == 2 ? z[2] : z[3];  // not `high`, which has one sign for both zeros
  int32_t token = first + e_high;
  if (temperature > 0.0f) {
    best = -infinity();
    key = top = order_key(best);
    const float reach = noise_reach(bound);
    bool reaches = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) reaches |= word_reaches(draw.words[e], z[e], reach);
    if (__any_sync(all, reaches)) {  // hardly ever, once a block or two of the row have been seen
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (const float score = z[e] + gumbel(draw.words[e]); score > best) best = score, own = z[e], token = first + e;
      key = order_key(best);
      top = __reduce_max_sync(all, key);
    }
  }
  // Lower lanes have the lower tokens. Where there is no score at all, every lane's rank is 0.
  if (__ffs(__ballot_sync(all, key == top)) - 1 == lane) {
    p.choice[at] = {rank_of(best, token), own, max};
    bound = fmaxf(bound, best);
  }
  __syncwarp();

  if (!p.sums) return;
  float sum = 0.0f;
  if (max > -infinity()) {
    sum = ((exp_rn(z[0] - max) + exp_rn(z[1] - max)) + exp_rn(z[2] - max)) + exp_rn(z[3] - max);
    for (int d = 16; d; d >>= 1) sum = sum + __shfl_xor_sync(all, sum, d);
  }
  if (lane == 0) p.sums[at] = sum;
}

// In shared memory behind a kernel's pipeline, in EpilogueShared's place.
template <int tokens> struct ChooseShared {
  static constexpr int pitch = kLseBlock + 4;  // the eight rows of a store in different banks
  RowChoice row[tokens];
  float bound[tokens];                // a score that each has reached so far
  alignas(16) float z[2][8][pitch];   // sums on their way from fragments to rows: two rounds of 8 tokens
  alignas(16) uint64_t full, empty;   // of `row`: made, read
};

// What an extra warp does (epilogue.cuh, assist): how the tokens [begin, end) of each tile are to be chosen.
template <typename Shared, typename WalkOf>
__device__ __forceinline__ void assist_choice(const LinearParams& p, Shared& shared, WalkOf&& walk_of, int begin, int end) {
  constexpr int tokens = sizeof(shared.row) / sizeof(RowChoice);
  const int lane = threadIdx.x % 32;
  ptx::grid_dependency_wait();
  const int rows = min(*p.num_rows, p.rows);
  const auto walk = walk_of(rows);
  int parity = 1, rows_before = -1;
  for (int tile = walk.first; tile < walk.end; tile += walk.step) {
    const int first_row = tile % walk.blocks * tokens;
    ptx::mbarrier_wait(ptx::shared_address(&shared.empty), parity);
    for (int t = begin + lane; t < min(end, rows - first_row); t += 32) {
      shared.row[t] = row_choice(p, first_row + t);
      if (first_row != rows_before) shared.bound[t] = -infinity();
    }
    ptx::mbarrier_arrive(ptx::shared_address(&shared.full));
    parity ^= 1;
    rows_before = first_row;
  }
}

// As Epilogue, for two warpgroups that hold 128 outputs together.
template <typename Shared> struct ChooseEpilogue {
  const LinearParams& p;
  Shared& shared;
  int warpgroup, first_row, rows, output;  // of the tile and of this warpgroup

  __device__ uint2 residual(int) const { return {}; }

  // The thread's fragment d of the 8 tokens from `at` of the tile.
  __device__ void finish(int at, float (&d)[4], uint2) const {
    float(&z)[8][Shared::pitch] = shared.z[at / 8 % 2];  // its readers of two rounds ago have come to the barrier of the last round since
    const Quad quad = quad_of(0, 64 * warpgroup, d);
    const float(&x)[4] = quad.value;
    ptx::store_shared(ptx::shared_address(&z[quad.token][quad.output]), make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
    const int warp = threadIdx.x / 32, row = first_row + at + warp, first_output = output - 64 * warpgroup;
    const Draw draw(shared.row[at + warp], first_output);
    ptx::named_barrier(1, 256);
    if (row >= rows || first_output >= p.out_features) return;
    choose_block(p, draw, shared.bound[at + warp], row, first_output, *reinterpret_cast<const float4*>(&z[warp][4 * (threadIdx.x % 32)]));
  }

  // After the last fragment: the next tile begins again with the first of the two rounds.
  __device__ void finish_squares(int, int) const { ptx::named_barrier(1, 256); }
};

}  // namespace specrt

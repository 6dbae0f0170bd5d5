// Few rows of bfloat16 on their way into linear_fp8's pipeline: four more warps of a CTA write each step's tokens and their scales where copies would bring them.
#pragma once
#include "gemm/quantize.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {

constexpr int kQuantizers = 4, kAhead = 6;  // warps, and blocks of 128 columns that each has on their way
constexpr int kRingRow = kScaleBlock * 2, kRingBytes = kQuantizers * kAhead * kRingRow;

// Where quantised tokens go: stage s at x + s * stage_bytes, their scales at scale + s * tokens; barriers: one arrival a row. ring: of kRingBytes, for those that are not yet quantised.
struct Pipeline {
  char* x;
  int stage_bytes;
  float* scale;
  int tokens;
  char* ring;
  uint32_t full, empty;
  int stages;
};

// Brings the tokens of one block of rows, `steps` steps of K from `begin` on, `tiles` times over; by kQuantizers warps, which take row after row of step after step in turn, each
// with kAhead of them on their way. Rows past num_rows come along: to know their number would take a load before the loads.
__device__ __forceinline__ void quantize_tokens(const LinearParams& p, const Pipeline& to, int begin, int steps, int tiles, int quantizer) {
  struct Place {  // in the sequence of rows
    int row, step, stage, parity;
  };
  const int lane = threadIdx.x % 32;
  auto advance = [&](Place& at, int rows) {
    at.row += rows;
    while (at.row >= p.rows) {
      at.row -= p.rows;
      if (++at.step == steps) at.step = 0;
      if (++at.stage == to.stages) {
        at.stage = 0;
        at.parity ^= 1;
      }
    }
  };
  Place load{0, 0, 0, 1};  // an `empty` barrier counts as complete the first time round
  advance(load, quantizer);
  Place store = load;
  char* const ring = to.ring + quantizer * (kAhead * kRingRow) + lane * 8;  // a lane reads what it has copied itself
  auto ask = [&](int i) {
    const int column = (begin + load.step) * kScaleBlock + 4 * lane;
    const bool present = column < p.in_features;
    ptx::cp_async_8(ptx::shared_address(ring + i * kRingRow), static_cast<const bf16*>(p.x) + static_cast<int64_t>(load.row) * p.in_features + (present ? column : 0), present);
    ptx::cp_async_commit();
    advance(load, kQuantizers);
  };
  ptx::grid_dependency_wait();
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) ask(i);
  int i = 0;
#pragma unroll 1
  for (int left = tiles * steps * p.rows - quantizer; left > 0; left -= kQuantizers) {
    ptx::cp_async_wait<kAhead - 1>();
    const QuantizedFour q = quantize_four(Packed<bf16>{.all = *reinterpret_cast<const uint2*>(ring + i * kRingRow)});
    ask(i);
    if (++i == kAhead) i = 0;
    ptx::mbarrier_wait(to.empty + 8 * store.stage, store.parity);
    const int chunk = lane / 4 ^ store.row % 8;  // the swizzle of ptx/wgmma.cuh
    *reinterpret_cast<uint32_t*>(to.x + store.stage * to.stage_bytes + store.row * kScaleBlock + chunk * 16 + lane % 4 * 4) = q.values;
    if (lane == 0) to.scale[store.stage * to.tokens + store.row] = q.scale;
    ptx::async_proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(to.full + 8 * store.stage);
    advance(store, kQuantizers);
  }
  ptx::cp_async_wait<0>();  // nothing is on its way into memory that another block may get
}

}  // namespace specrt

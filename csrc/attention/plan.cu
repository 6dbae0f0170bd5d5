// Makes the plan of tree attention (plan.cuh): one block walks the packed rows. It stands before the weights of a first layer, which come while it works.
#include "attention/plan.cuh"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kLogGroup = 3;
constexpr int kNear = 512;  // rows of a plan that is made in shared memory: one of more is made where it will lie

struct Max {
  __device__ int operator()(int a, int b) const { return max(a, b); }
  __device__ int of_warp(int x) const { return __reduce_max_sync(~0u, x); }
};
struct Plus {
  __device__ int operator()(int a, int b) const { return a + b; }
  __device__ int of_warp(int x) const { return __reduce_add_sync(~0u, x); }
};

// A scan over the block of values that are not negative, in two steps with a barrier between them: what the threads before and the thread itself have, first of a warp; `total`: all.
template <typename F> __device__ int scan_warp(int x, F f, int* warps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int y = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x = f(x, y);
  }
  if (lane == 31) warps[warp] = x;
  return x;
}
template <typename F> __device__ int scan_block(int x, F f, int& total, const int* warps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, of_warp = lane < kWarps ? warps[lane] : 0;
  total = f.of_warp(of_warp);
  return f(x, f.of_warp(lane < warp ? of_warp : 0));
}

template <bool Near> __global__ void __launch_bounds__(kThreads) attention_plan_kernel(AttentionPlanParams p, int most, int slots) {
  __shared__ int warps[2][kWarps], totals[3][kWarps], firsts[kMostShares + 1];
  __shared__ Block near[Near ? kNear : 1];
  ptx::grid_dependency_wait();
  ptx::launch_dependents();  // now: sooner, weights that fill a pipeline and then wait would only stand in the way of what is before
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool has_paths = p.ancestors || p.paths;
  int32_t* const plan_blocks = p.plan + kPlanHeader + kPlanShare * kMostShares;
  int32_t* const lens = plan_blocks + kPlanBlock * p.rows;
  Block* const blocks = Near ? near : reinterpret_cast<Block*>(plan_blocks);
  PlanShare* const shares = reinterpret_cast<PlanShare*>(p.plan + kPlanHeader);

  // A thread a row: all it reads, at once; then the block that it is in.
  const int rows = min(*p.num_rows, p.rows);
  int base = 0, count = 0, run_begin = 0;
  do {
    const int r = base + threadIdx.x;
    int request = 0, prefix = 0, len = 0, nodes = 0;
    unsigned long long wanted = 0;
    bool together = false;  // it goes on with row r - 1's run
    if (r < p.rows) {
      const int before = max(r - 1, 0), request_before = p.row_request[before], prefix_before = p.row_prefix[before];
      request = p.row_request[r];
      prefix = p.row_prefix[r];
      if (p.ancestors) {
        wanted = static_cast<unsigned long long>(p.ancestors[r]);
        len = __popcll(wanted);
        nodes = 64 - __clzll(static_cast<long long>(wanted));
      } else if (p.paths) {
        len = path_length(p.paths + static_cast<int64_t>(r) * p.path_depth, p.path_depth);
      }
      len += prefix;
      together = r > 0 && request == request_before && (!has_paths || prefix == prefix_before);
    }
    const bool there = r < rows;
    if (there) lens[r] = len;
    const int begin_here = scan_warp(there && !together ? r : (threadIdx.x == 0 ? run_begin : 0), Max(), warps[0]);
    __syncthreads();
    const int begin = scan_block(begin_here, Max(), run_begin, warps[0]);
    const bool leads = there && (r - begin) % most == 0;
    const int place_here = scan_warp(leads, Plus(), warps[1]);
    __syncthreads();
    int leaders;
    Block* const block = blocks + count + scan_block(place_here, Plus(), leaders, warps[1]) - 1;
    count += leaders;
    if (leads) *block = {r, 0, request, 0, 0, 0x7fffffff, 0, 0, has_paths ? prefix : p.row_prefix[begin] - 1, 0, 0, 0};
    __syncthreads();
    if (there) {
      atomicAdd(&block->rows, 1);
      atomicMax(&block->prefix, prefix);
      atomicMin(&block->shortest, len);
      atomicMax(&block->longest, len);
      if (p.ancestors) {
        atomicMax(&block->nodes, nodes);
        atomicOr(&block->wanted, static_cast<int>(wanted));
      }
    }
    base += kThreads;
  } while (base < rows);
  __syncthreads();

  // Whole groups, or chunks? In units of a chunk's time: the longest CTA's work.
  int chunks = 0, groups = 0, longest = 0, parted = 0;
#pragma unroll 1
  for (int b = threadIdx.x; b < count; b += kThreads) {
    chunks += blocks[b].pieces(0);
    groups += blocks[b].pieces(kLogGroup);
    longest = max(longest, min(kGroupChunks, blocks[b].pieces(0)));
    parted |= blocks[b].longest > kGroup || blocks[b].shortest == 0;  // nobody's chunks: zeros are the combine kernel's
  }
  const int of_warp[3] = {Plus().of_warp(chunks), Plus().of_warp(groups), Max().of_warp(longest)};
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < 3; ++i) totals[i][warp] = of_warp[i];
  const bool all_whole = !__syncthreads_or(parted);
  auto total = [&](int i, auto f) { return f.of_warp(lane < kWarps ? totals[i][lane] : 0); };
  const int all_chunks = total(0, Plus()), all_groups = total(1, Plus()), most_chunks = total(2, Max());
  const int by_chunk = (all_chunks * p.kv_heads + slots - 1) / slots, by_group = (all_groups * p.kv_heads + slots - 1) / slots * most_chunks;
  const int log_run = by_group <= by_chunk + by_chunk / 4 ? kLogGroup : 0;

  int pieces = 0, units = 0;
  for (int base = 0; base < count; base += kThreads) {
    const int b = base + threadIdx.x, own_pieces = b < count ? blocks[b].pieces(log_run) : 0, own_units = b < count ? blocks[b].units(has_paths) : 0;
    const int pieces_here = scan_warp(own_pieces, Plus(), warps[0]), units_here = scan_warp(own_units, Plus(), warps[1]);
    __syncthreads();
    int all_pieces, all_units;
    const int pieces_upto = scan_block(pieces_here, Plus(), all_pieces, warps[0]), units_upto = scan_block(units_here, Plus(), all_units, warps[1]);
    if (b < count) {
      blocks[b].pieces_before = pieces + pieces_upto - own_pieces;
      blocks[b].units_before = units + units_upto - own_units;
    }
    pieces += all_pieces;
    units += all_units;
    __syncthreads();
  }
  if (threadIdx.x == 0) *reinterpret_cast<PlanHeader*>(p.plan) = {count, log_run, log_run && all_whole, 0};

  // Jobs are shared out one each while there are CTAs for them, else to the CTA in whose part of all units they begin.
  const int jobs = pieces * p.kv_heads;
  auto block_of = [&](int what, auto&& before) {  // the last one that has no more than `what` before it
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before(blocks[middle]) <= what ? low : high) = middle;
    }
    return low;
  };
  auto first = [&](int cta) {
    if (jobs <= slots) return min(cta, jobs);
    const int unit = static_cast<int>(static_cast<int64_t>(units) * p.kv_heads * cta / slots);
    const Block& block = blocks[block_of(unit / p.kv_heads, [](const Block& b) { return b.units_before; })];
    const int of_block = unit - block.units_before * p.kv_heads, of_head = block.units(has_paths), piece = kChunkTiles << log_run;
    return block.pieces_before * p.kv_heads + of_block / of_head * block.pieces(log_run) + (of_block % of_head + piece - 1) / piece;
  };
#pragma unroll 1
  for (int cta = threadIdx.x; cta <= slots; cta += kThreads) firsts[cta] = cta == slots ? jobs : first(cta);
  __syncthreads();
#pragma unroll 1
  for (int cta = threadIdx.x; cta < slots; cta += kThreads) {
    const int begin = firsts[cta], share = firsts[cta + 1] - begin;
    if (share == 0) {
      shares[cta].jobs = 0;
      continue;
    }
    const int index = block_of(begin / p.kv_heads, [](const Block& b) { return b.pieces_before; });
    const int of_block = begin - blocks[index].pieces_before * p.kv_heads, of_head = blocks[index].pieces(log_run);
    shares[cta] = {share, index, of_block / of_head, of_block % of_head, blocks[index]};
  }
  if constexpr (Near)
#pragma unroll 1
    for (int b = threadIdx.x; b < count; b += kThreads) reinterpret_cast<Block*>(plan_blocks)[b] = near[b];
}

}  // namespace

void launch_attention_plan_cuda(const AttentionPlanParams& p, void* stream) {
  const TreeShape shape = tree_shape(p.rows, p.requests, p.q_heads / p.kv_heads, p.kv_heads, p.path_depth);
  launch({dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, p.rows <= kNear ? attention_plan_kernel<true> : attention_plan_kernel<false>, p, shape.most_rows,
         most_ctas(shape));
}

}  // namespace specrt

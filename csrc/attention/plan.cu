// Makes the plan of tree attention (plan.cuh): one block walks the packed rows. It stands before the weights of a first layer, which come while it works.
#include "attention/plan.cuh"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kLogGroup = 3;
constexpr int kNear = 512;  // rows of a plan that is made in shared memory: one of more is made where it will lie

// The sum over the warp up to this lane.
__device__ __forceinline__ int sum_to_lane(int x) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int y = __shfl_up_sync(~0u, x, d);
    if (threadIdx.x % 32 >= d) x += y;
  }
  return x;
}

template <bool Near> __global__ void __launch_bounds__(kThreads) attention_plan_kernel(AttentionPlanParams p, int most, int slots) {
  __shared__ int last_start[kWarps], firsts[kMostShares + 1];
  __shared__ int4 of_warps[kWarps];  // blocks, chunks, groups, units
  __shared__ int2 tops[kWarps];      // chunks of a block, at most a group; whether one is parted
  __shared__ Block near[Near ? kNear : 1];
  ptx::grid_dependency_wait();
  ptx::launch_dependents();  // now: sooner, weights that fill a pipeline and then wait would only stand in the way of what is before
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool has_paths = p.ancestors || p.paths;
  int32_t* const plan_blocks = p.plan + kPlanHeader + kPlanShare * kMostShares;
  int32_t* const lens = plan_blocks + kPlanBlock * p.rows;
  Block* const blocks = Near ? near : reinterpret_cast<Block*>(plan_blocks);
  PlanShare* const shares = reinterpret_cast<PlanShare*>(p.plan + kPlanHeader);

  // A thread a row: all it reads, at once; then what it adds to its block, which for now stands in the place of its first row.
  const int rows = min(*p.num_rows, p.rows);
  int base = 0, run_begin = 0;
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
        int last = -1;
        len = path_length(p.paths + static_cast<int64_t>(r) * p.path_depth, p.path_depth, last);
        nodes = last + 1;
      }
      len += prefix;
      together = r > 0 && request == request_before && (!has_paths || prefix == prefix_before);
    }
    const bool there = r < rows;
    if (there) {
      blocks[r] = {r, 0, request, 0, 0, 0x7fffffff, 0, 0, 0, 0, 0, 0};
      lens[r] = len;
    }
    const unsigned starts = __ballot_sync(~0u, there && !together), upto = starts & ~0u >> (31 - lane);
    if (lane == 0) last_start[warp] = starts ? r + 31 - __clz(starts) : 0;
    __syncthreads();
    const int last = lane < kWarps ? last_start[lane] : 0, before = __reduce_max_sync(~0u, lane < warp ? last : run_begin);
    run_begin = __reduce_max_sync(~0u, max(last, run_begin));
    if (there) {
      const int begin = upto ? r - lane + 31 - __clz(upto) : before, first = r - (r - begin) % most;
      Block& block = blocks[first];
      if (first == r) block.settled = has_paths ? prefix : p.row_prefix[begin] - 1;
      atomicAdd(&block.rows, 1);
      atomicMax(&block.prefix, prefix);
      atomicMin(&block.shortest, len);
      atomicMax(&block.longest, len);
      atomicMax(&block.nodes, nodes);
      if (p.ancestors) atomicOr(&block.wanted, static_cast<int>(wanted));
    }
    __syncthreads();
    base += kThreads;
  } while (base < rows);

  // Then the blocks get their numbers, and move there.
  int count = 0, all_chunks = 0, all_groups = 0, units = 0, most_chunks = 0;
  bool all_whole = true;
  for (base = 0; base < rows; base += kThreads) {
    const int r = base + threadIdx.x;
    Block block{};
    if (r < rows) block = blocks[r];
    const bool leads = block.rows > 0;
    // A row by itself whose path is the nodes 0, 1, .. has its keys at their positions, as it would without a path.
    if (block.rows == 1 && block.nodes == block.longest - block.prefix) block.prefix = block.longest, block.nodes = 0;
    const unsigned leaders = __ballot_sync(~0u, leads);
    const int own_chunks = leads ? block.pieces(0) : 0, own_groups = leads ? block.pieces(kLogGroup) : 0, own_units = leads ? block.units(has_paths) : 0;
    const int chunks = sum_to_lane(own_chunks), groups = sum_to_lane(own_groups), upto = sum_to_lane(own_units), top = __reduce_max_sync(~0u, min(kGroupChunks, own_chunks));
    const bool parted = __any_sync(~0u, leads && (block.longest > kGroup || block.shortest == 0));  // nobody's chunks: zeros are the combine kernel's
    if (lane == 31) {
      of_warps[warp] = {__popc(leaders), chunks, groups, upto};
      tops[warp] = {top, parted};
    }
    __syncthreads();
    const int4 sums = lane < kWarps ? of_warps[lane] : int4{}, below = lane < warp ? sums : int4{};
    const int2 most_of = lane < kWarps ? tops[lane] : int2{};
    const int place = count + __reduce_add_sync(~0u, below.x) + __popc(leaders & ((1u << lane) - 1));
    block.chunks_before = all_chunks + __reduce_add_sync(~0u, below.y) + chunks - own_chunks;
    block.groups_before = all_groups + __reduce_add_sync(~0u, below.z) + groups - own_groups;
    block.units_before = units + __reduce_add_sync(~0u, below.w) + upto - own_units;
    if (leads) {
      blocks[place] = block;  // these have all been read
      if (Near) reinterpret_cast<Block*>(plan_blocks)[place] = block;
    }
    count += __reduce_add_sync(~0u, sums.x);
    all_chunks += __reduce_add_sync(~0u, sums.y);
    all_groups += __reduce_add_sync(~0u, sums.z);
    units += __reduce_add_sync(~0u, sums.w);
    most_chunks = max(most_chunks, __reduce_max_sync(~0u, most_of.x));
    all_whole = all_whole && !__any_sync(~0u, most_of.y);
    __syncthreads();
  }

  // Whole groups, or chunks? In units of a chunk's time: the longest CTA's work. To write, read and fold the parts of chunks takes as long again as the chunks.
  const int by_chunk = (all_chunks * p.kv_heads + slots - 1) / slots, by_group = (all_groups * p.kv_heads + slots - 1) / slots * most_chunks;
  const int log_run = by_group <= 2 * by_chunk - 1 ? kLogGroup : 0;
  if (threadIdx.x == 0) *reinterpret_cast<PlanHeader*>(p.plan) = {count, log_run, log_run && all_whole, 0};

  // Jobs are shared out one each while there are CTAs for them, else to the CTA in whose part of all units they begin.
  const int jobs = (log_run ? all_groups : all_chunks) * p.kv_heads;
  auto pieces_before = [&](const Block& block) { return log_run ? block.groups_before : block.chunks_before; };
  auto block_of = [&](int what, auto&& before) {  // the last one that has no more than `what` before it
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before(blocks[middle]) <= what ? low : high) = middle;
    }
    return low;
  };
  auto first = [&](int cta) {
    const int unit = static_cast<int>(static_cast<int64_t>(units) * p.kv_heads * cta / slots);
    const Block& block = blocks[block_of(unit / p.kv_heads, [](const Block& b) { return b.units_before; })];
    const int of_block = unit - block.units_before * p.kv_heads, of_head = block.units(has_paths), piece = kChunkTiles << log_run;
    return pieces_before(block) * p.kv_heads + of_block / of_head * block.pieces(log_run) + (of_block % of_head + piece - 1) / piece;
  };
  const bool one_each = jobs <= slots;
  if (!one_each) {
#pragma unroll 1
    for (int cta = threadIdx.x; cta <= slots; cta += kThreads) firsts[cta] = cta == slots ? jobs : first(cta);
    __syncthreads();
  }
#pragma unroll 1
  for (int cta = threadIdx.x; cta < slots; cta += kThreads) {
    const int begin = one_each ? cta : firsts[cta], share = one_each ? cta < jobs : firsts[cta + 1] - begin;
    if (share == 0) {
      shares[cta].jobs = 0;
      continue;
    }
    const int index = block_of(begin / p.kv_heads, pieces_before);
    const int of_block = begin - pieces_before(blocks[index]) * p.kv_heads, of_head = blocks[index].pieces(log_run);
    shares[cta] = {share, index, of_block / of_head, of_block % of_head, blocks[index]};
  }
}

}  // namespace

void launch_attention_plan_cuda(const AttentionPlanParams& p, void* stream) {
  const TreeShape shape = tree_shape(p.rows, p.requests, p.q_heads / p.kv_heads, p.kv_heads, p.max_len, p.path_depth, p.fp8);
  launch({dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, p.rows <= kNear ? attention_plan_kernel<true> : attention_plan_kernel<false>, p, shape.most_rows,
         most_ctas(shape));
}

}  // namespace specrt

// Makes the plan of tree attention (plan.cuh): one block walks the packed rows. It stands before the weights of a first layer, which come while it works.
#include "attention/plan.cuh"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kLogGroup = 3;
constexpr int kNear = 256;  // blocks that are made in shared memory: a plan of more rows is made where it will lie

// The combination of what the threads before and the thread itself have, over the block; `total`: of all. Operator: max or plus.
template <typename F> __device__ int scan(int x, F f, int identity, int& total, int* warps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int y = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x = f(x, y);
  }
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  int before = identity;
  total = identity;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before = f(before, warps[w]);
    total = f(total, warps[w]);
  }
  __syncthreads();
  return f(before, x);
}

struct Max {
  __device__ int operator()(int a, int b) const { return max(a, b); }
};
struct Plus {
  __device__ int operator()(int a, int b) const { return a + b; }
};

__global__ void __launch_bounds__(kThreads) attention_plan_kernel(AttentionPlanParams p, int most, int slots) {
  __shared__ int warps[kWarps];
  ptx::grid_dependency_wait();
  ptx::launch_dependents();  // now: sooner, weights that fill a pipeline and then wait would only stand in the way of what is before
  const int rows = min(*p.num_rows, p.rows), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool has_paths = p.ancestors || p.paths;
  __shared__ Block near[kNear];
  int32_t* const plan_blocks = p.plan + kPlanHeader + kPlanShare * kMostShares;
  Block* const blocks = p.rows <= kNear ? near : reinterpret_cast<Block*>(plan_blocks);
  PlanShare* const shares = reinterpret_cast<PlanShare*>(p.plan + kPlanHeader);
  auto together = [&](int r) {  // row r goes on with row r - 1's run
    return r > 0 && p.row_request[r] == p.row_request[r - 1] && (!has_paths || p.row_prefix[r] == p.row_prefix[r - 1]);
  };

  int count = 0, run_begin = 0;
  for (int base = 0; base < rows; base += kThreads) {
    const int r = base + threadIdx.x;
    int last;
    const int begin = scan(r < rows && !together(r) ? r : (threadIdx.x == 0 ? run_begin : 0), Max(), 0, last, warps);
    run_begin = last;
    const bool leads = r < rows && (r - begin) % most == 0;
    int leaders;
    const int place = count + scan(leads, Plus(), 0, leaders, warps) - 1;
    if (leads) {
      blocks[place].begin = r;
      blocks[place].settled = has_paths ? p.row_prefix[r] : p.row_prefix[begin] - 1;
    }
    count += leaders;
  }
  __syncthreads();

  // What the rows of a block see: a warp a block.
  for (int b = warp; b < count; b += kWarps) {
    const int begin = blocks[b].begin, end = b + 1 < count ? blocks[b + 1].begin : rows;
    int prefix = 0, shortest = 0x7fffffff, longest = 0, nodes = 0;
    unsigned long long wanted = 0;
    for (int r = begin + lane; r < end; r += 32) {
      int len = p.row_prefix[r];
      prefix = max(prefix, len);
      if (p.ancestors) {
        const long long word = p.ancestors[r];
        len += __popcll(word);
        nodes = max(nodes, 64 - __clzll(word));
        wanted |= word;
      } else if (p.paths) {
        bool goes_on = true;
#pragma unroll 8
        for (int d = 0; d < p.path_depth; ++d) {  // loads that do not wait for each other
          const int node = p.paths[static_cast<int64_t>(r) * p.path_depth + d];
          goes_on = goes_on && node >= 0;
          len += goes_on;
          if (goes_on) nodes = max(nodes, node + 1);
        }
      }
      shortest = min(shortest, len);
      longest = max(longest, len);
    }
    prefix = __reduce_max_sync(~0u, prefix);
    shortest = __reduce_min_sync(~0u, shortest);
    longest = __reduce_max_sync(~0u, longest);
    nodes = __reduce_max_sync(~0u, nodes);
    const unsigned low = __reduce_or_sync(~0u, static_cast<unsigned>(wanted)), high = __reduce_or_sync(~0u, static_cast<unsigned>(wanted >> 32));
    // A row by itself whose path is the nodes 0, 1, .. has its keys at their positions as it would without a path.
    if (end - begin == 1 && nodes == longest - prefix) prefix = longest, nodes = 0;
    if (lane == 0) {
      blocks[b].rows = end - begin;
      blocks[b].request = p.row_request[begin];
      blocks[b].prefix = prefix;
      blocks[b].shortest = shortest;
      blocks[b].longest = longest;
      blocks[b].nodes = nodes;
      blocks[b].wanted_low = static_cast<int>(low);
      blocks[b].wanted_high = static_cast<int>(high);
    }
  }
  __syncthreads();

  // Whole groups, or chunks? In units of a chunk's time: the longest CTA's work.
  int chunks = 0, groups = 0, longest = 0, parted = 0;
  for (int b = threadIdx.x; b < count; b += kThreads) {
    chunks += blocks[b].pieces(0);
    groups += blocks[b].pieces(kLogGroup);
    longest = max(longest, min(kGroupChunks, blocks[b].pieces(0)));
    parted |= blocks[b].longest > kGroup || blocks[b].shortest == 0;  // nobody's chunks: zeros are the combine kernel's
  }
  int all_chunks, all_groups, most_chunks;
  scan(chunks, Plus(), 0, all_chunks, warps);
  scan(groups, Plus(), 0, all_groups, warps);
  scan(longest, Max(), 0, most_chunks, warps);
  const int by_chunk = (all_chunks * p.kv_heads + slots - 1) / slots, by_group = (all_groups * p.kv_heads + slots - 1) / slots * most_chunks;
  const bool all_whole = !__syncthreads_or(parted);
  const int log_run = by_group <= by_chunk + by_chunk / 4 ? kLogGroup : 0;

  int pieces = 0, units = 0;
  for (int base = 0; base < count; base += kThreads) {
    const int b = base + threadIdx.x, own_pieces = b < count ? blocks[b].pieces(log_run) : 0, own_units = b < count ? blocks[b].units(has_paths) : 0;
    int all_pieces, all_units;
    const int pieces_upto = scan(own_pieces, Plus(), 0, all_pieces, warps), units_upto = scan(own_units, Plus(), 0, all_units, warps);
    if (b < count) {
      blocks[b].pieces_before = pieces + pieces_upto - own_pieces;
      blocks[b].units_before = units + units_upto - own_units;
    }
    pieces += all_pieces;
    units += all_units;
  }
  __syncthreads();
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
  for (int cta = threadIdx.x; cta < slots; cta += kThreads) {
    const int begin = first(cta), share = (cta + 1 == slots ? jobs : first(cta + 1)) - begin;
    if (share == 0) {
      shares[cta].jobs = 0;
      continue;
    }
    const int index = block_of(begin / p.kv_heads, [](const Block& b) { return b.pieces_before; });
    const int of_block = begin - blocks[index].pieces_before * p.kv_heads, of_head = blocks[index].pieces(log_run);
    shares[cta] = {share, index, of_block / of_head, of_block % of_head, blocks[index]};
  }
  if (blocks != near) return;
  for (int i = threadIdx.x; i < count * kPlanBlock; i += kThreads) plan_blocks[i] = reinterpret_cast<const int32_t*>(near)[i];
}

}  // namespace

void launch_attention_plan_cuda(const AttentionPlanParams& p, void* stream) {
  const TreeShape shape = tree_shape(p.rows, p.requests, p.q_heads / p.kv_heads, p.kv_heads, p.path_depth, p.fp8);
  launch({dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), 1, true}, attention_plan_kernel, p, shape.most_rows, most_ctas(shape));
}

}  // namespace specrt

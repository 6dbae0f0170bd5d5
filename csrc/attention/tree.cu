// Decode, verify and draft-expansion attention, bf16 over bf16 or e4m3 pools, on Hopper.
//
// A job is a block of rows of one request, a KV head and a run of chunks of 256 positions (plan.cuh). Rows x query heads stand side by side as the 64 vectors of a
// warpgroup, or the 128 of two, so that K and V are read once for all of them. A producer warp (tree_producer.cuh) keeps the ring of stages full by tensor copies, one a page
// (keys of paths: 16 bytes a lane); tiles of e4m3 pools are widened by the warps beside the producer before anybody else sees them (widen.cuh). While a tile's P V is on the
// tensor cores, so are the next tile's scores. (Making two warpgroups take turns on the tensor cores: 3 % slower.)
//
// From a block's common prefix on each row has keys of its own, its path's. Their scores are made for all rows at once, in the order of the nodes; the probabilities then are
// picked in groups of 16 logical positions, and each row's group meets the V rows of its own path (row addresses of ldmatrix).
//
// A run folds its chunks where they are; what is not a row's whole answer goes through the workspace to the combine kernel. Which CTA does what changes no bit.
//
// Bytes: K and V once a block of rows (the blocks of a request share them through L2), D + 2 floats for each vector and run.
#include "attention/tree_consumer.cuh"
#include "attention/tree_producer.cuh"
#include "ptx/registers.cuh"

#include <type_traits>

namespace specrt {
namespace {

template <typename S> __global__ void __launch_bounds__(S::threads, S::blocks_per_sm)
tree_attention_kernel(const __grid_constant__ CUtensorMap k_pages, const __grid_constant__ CUtensorMap v_pages, const __grid_constant__ AttentionParams p, float scale) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Rest<S>& rest = *reinterpret_cast<Rest<S>*>(shared + S::rest);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t stages = ptx::shared_address(shared), full = ptx::shared_address(rest.full), empty = ptx::shared_address(rest.empty),
                 narrow = ptx::shared_address(rest.narrow);
  if (threadIdx.x == S::consumers) {
    ptx::prefetch_tensor_map(&k_pages);
    ptx::prefetch_tensor_map(&v_pages);
  }
  ptx::launch_dependents();
  // Before the wait: who does what, and the producer's first tiles (params.h).
  if (threadIdx.x == 0) rest.consumers = Job(p);
  if (threadIdx.x == S::consumers) rest.producer = Job(p);
  if (threadIdx.x == 32) {
    for (int s = 0; s < S::stages; ++s) {
      ptx::mbarrier_init(full + 8 * s, S::Tile::fp8 ? 32 * kWideners : 1);
      ptx::mbarrier_init(empty + 8 * s, S::consumers);
      ptx::mbarrier_init(narrow + 8 * s, 1);
      rest.end[s] = false;
    }
    ptx::mbarrier_init_fence();
    rest.zeros = make_uint4(0, 0, 0, 0);
    rest.log_step = 16 % (p.q_heads / p.kv_heads) == 0 ? 1 + S::warpgroups : 0;
  }
  if (threadIdx.x < 128) rest.ones[threadIdx.x] = 0x3f80;
  if (threadIdx.x < S::vectors) {  // rows in turn to the warps, if a warp has whole ones
    const int group_heads = p.q_heads / p.kv_heads, mine = threadIdx.x % 16, by_turns = 16 % group_heads == 0, at = by_turns ? mine : threadIdx.x, row = at / group_heads;
    rest.row_of[threadIdx.x] = static_cast<uint8_t>(by_turns ? row * S::warps + threadIdx.x / 16 : row);
    rest.head_of[threadIdx.x] = static_cast<uint8_t>(at - row * group_heads);
  }
  ptx::async_proxy_fence();
  __syncthreads();

  if (warp >= S::warps) {
    ptx::give_registers<S::producer_registers>();
    Job& job = rest.producer;
    if (job.jobs == 0) return ptx::grid_dependency_wait();  // this grid must not end before the one it depends on
    if (warp > S::warps) {
      if constexpr (S::Tile::fp8) widen_tiles<S>(rest, stages, narrow, full, warp - S::warps - 1, lane);
      return;
    }
    Producer<S> producer{p, stages, S::Tile::fp8 ? narrow : full, empty, lane};
    for (;;) {
      producer.run(job, &k_pages, &v_pages);
      if (job.jobs == 1) break;
      __syncwarp();
      if (lane == 0) job.advance(p);
      __syncwarp();
    }
    if constexpr (S::Tile::fp8) producer.end(rest);
    return;
  }

  ptx::take_registers<S::consumer_registers>();
  Consumer<S> consumer{p, rest, reinterpret_cast<float4*>(shared + S::kept) + threadIdx.x, stages, stages + S::queries + warp / 4 * S::tile_bytes, ptx::shared_address(rest.ones), warp,
                       lane, scale};
  if (rest.consumers.jobs == 0) return;
  for (bool first = true;; first = false) {
    consumer.begin(first);
    consumer.run();
    if (rest.consumers.jobs == 1) break;
  }
}

template <typename S> void launch_shape(const AttentionParams& p, const TreeShape& shape, cudaStream_t stream) {
  static_assert(kSharedBytes<S> <= (228 / S::blocks_per_sm - 1) * 1024, "more shared memory than an SM has");
  launch({dim3(tree_ctas(p, shape)), dim3(S::threads), kSharedBytes<S>, stream, 1, true}, tree_attention_kernel<S>, pool_map<typename S::Tile>(p, p.k_pool, p.page),
         pool_map<typename S::Tile>(p, p.v_pool, p.page), p, score_factor(p));
  launch_combine<S::dim>(p, stream);
}

template <int D, typename KV> void launch_dim(const AttentionParams& p, cudaStream_t stream) {
  const TreeShape shape = tree_shape(p.rows, p.requests, p.q_heads / p.kv_heads, p.kv_heads, p.max_pages * p.page, p.path_depth, !std::is_same_v<KV, bf16>);
  if constexpr (std::is_same_v<KV, bf16>)
    if (shape.warpgroups == 0) return launch_decode_attention(p, shape, stream);
  shape.warpgroups == 2 ? launch_shape<Shape<D, 2, KV>>(p, shape, stream) : launch_shape<Shape<D, 1, KV>>(p, shape, stream);
}

template <typename KV> void launch_pool(const AttentionParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return launch_dim<64, KV>(p, stream);
    case 96: return launch_dim<96, KV>(p, stream);
    case 128: return launch_dim<128, KV>(p, stream);
    default: fail("tree_attention: head dim " + std::to_string(p.head_dim) + " on CUDA; 64, 96 and 128 are built");
  }
}

}  // namespace

void launch_tree_attention_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kF32) return launch_attention_f32(p, stream);
  require_hopper("tree_attention");
  auto s = static_cast<cudaStream_t>(stream);
  p.kv_dtype == DType::kE4M3 ? launch_pool<e4m3>(p, s) : launch_pool<bf16>(p, s);
}

}  // namespace specrt

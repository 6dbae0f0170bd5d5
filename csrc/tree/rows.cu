// Packed rows: of all token trees, of spans of committed tokens, and of accepted paths. A block a slot; each sums the sizes of the slots before it, so no block
// waits for another. Bytes: a few words a row.
#include "base/launch.h"
#include "ptx/dependency.cuh"
#include "tree/block.cuh"
#include "tree/rules.h"

namespace specrt {
namespace {

// First row of slot b, given every slot's number of rows; row_offset and num_rows written on the way, cut at the R rows there are.
template <typename Size> __device__ int place_slot(int b, int batch, int rows, int32_t* row_offset, int32_t* num_rows, Size&& size) {
  const int first = block_sum(b, size);
  if (threadIdx.x == 0) {
    row_offset[b] = min(first, rows);
    if (b == batch - 1) row_offset[batch] = *num_rows = min(first + size(b), rows);
  }
  return first;
}

__global__ void tree_build_kernel(TreeBuildParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int b = blockIdx.x, node = threadIdx.x;
  const int first = place_slot(b, p.batch, p.rows, p.row_offset, p.num_rows, [&](int i) { return active_nodes(p, i); });
  __shared__ int32_t parent[kMaxNodes];
  const int size = active_nodes(p, b);
  if (node == 0 && !p.active[b]) p.tree_size[b] = 0;  // the others look at neither
  const int64_t at = static_cast<int64_t>(b) * p.nodes + node;
  if (node < size) parent[node] = node ? parent_before(p.tree_parent[at], node) : 0;
  __syncthreads();
  if (node >= size) return;
  uint64_t ancestors = 1;
  for (int n = node; n > 0; n = parent[n]) ancestors |= uint64_t{1} << n;
  const int depth = __popcll(ancestors) - 1, prefix = p.seq_lens[b], row = first + node;
  p.tree_depth[at] = depth;
  p.tree_ancestors[at] = static_cast<int64_t>(ancestors);
  if (row >= p.rows) return;
  p.row_request[row] = b;
  p.row_node[row] = node;
  p.row_token[row] = p.tree_token[at];
  p.row_position[row] = prefix + depth;
  p.row_prefix[row] = prefix;
  p.row_slot[row] = kv_slot(p.paging, b, prefix + node);
  p.row_ancestors[row] = static_cast<int64_t>(ancestors);
}

__global__ void span_rows_kernel(SpanRowsParams p) {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const int b = blockIdx.x;
  auto size = [&](int i) { return max(min(p.end[i], p.max_len) - max(p.start[i], 0), 0); };
  const int first = place_slot(b, p.batch, p.rows, p.row_offset, p.num_rows, size), start = max(p.start[b], 0);
  const int count = min(size(b), p.rows - first);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int row = first + i, position = start + i;
    p.row_request[row] = b;
    p.row_token[row] = p.history[static_cast<int64_t>(b) * p.max_len + position];
    p.row_position[row] = position;
    p.row_prefix[row] = position + 1;
    p.row_slot[row] = kv_slot(p.paging, b, position);
  }
}

__global__ void path_rows_kernel(PathRowsParams p) {
  ptx::grid_dependency_wait();
  ptx::launch_dependents();  // as in attention/plan.cu: a head's weights come from here on
  auto all = [&](int i) {
    const int size = path_size(p, i);
    return size + path_masks(p, i, size);
  };
  const int b = blockIdx.x, first = block_sum(b, all), size = path_size(p, b), end = min(first + all(b), p.rows);
  for (int row = first + threadIdx.x; row < end; row += blockDim.x) write_path_row(p, b, row - first, size, row);
  if (b == p.batch - 1 && threadIdx.x == 0) *p.num_rows = end;
}

}  // namespace

void launch_tree_build_cuda(const TreeBuildParams& p, void* stream) {
  launch({dim3(p.batch), dim3(kMaxNodes), 0, static_cast<cudaStream_t>(stream), 1, true}, tree_build_kernel, p);
}

void launch_span_rows_cuda(const SpanRowsParams& p, void* stream) {
  launch({dim3(p.batch), dim3(256), 0, static_cast<cudaStream_t>(stream), 1, true}, span_rows_kernel, p);
}

void launch_path_rows_cuda(const PathRowsParams& p, void* stream) {
  launch({dim3(p.batch), dim3(128), 0, static_cast<cudaStream_t>(stream), 1, true}, path_rows_kernel, p);
}

}  // namespace specrt

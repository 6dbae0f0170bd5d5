// head_input: a block a half of a row: the token's, or the feature's.
#include "base/launch.h"
#include "norm/row.cuh"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

template <typename T, bool kVector> __global__ void __launch_bounds__(kNormThreads) head_input_kernel(HeadInputParams p) {
  ptx::launch_dependents();
  const int row = blockIdx.x, h = p.hidden;
  const bool of_token = blockIdx.y == 0;
  const T* norm = static_cast<const T*>(of_token ? p.token_weight : p.feature_weight);
  const RowWeight<T, kVector> weight(norm, norm ? h : 0);
  ptx::grid_dependency_wait();
  if (row >= *p.num_rows) return;
  const int64_t from = of_token ? p.ids[row] : p.parent ? p.parent[row] : row;
  const bool known = from >= 0 && from < (of_token ? p.vocab : p.features);
  const T* x = static_cast<const T*>(of_token ? p.table : p.feature) + (known ? from : 0) * h;
  T* joined = static_cast<T*>(p.joined) + (2 * static_cast<int64_t>(row) + (of_token == p.feature_first)) * h;
  T* stream = of_token || !p.stream ? nullptr : static_cast<T*>(p.stream) + static_cast<int64_t>(row) * h;
  if (norm && known) {
    norm_row(x, weight, h, p.eps, [&](int i, const T (&y)[kVec]) {
      store8<T, kVector>(joined + i, h - i, y);
      if (stream && p.stream_normed) store8<T, kVector>(stream + i, h - i, y);
    });
    if (!stream || p.stream_normed) return;
    joined = nullptr;  // what is left is the stream
  }
  for (int i = kVec * threadIdx.x; i < h; i += kNormLanes) {
    T y[kVec];
    load8<T, kVector>(x + i, h - i, y);
    if (!known)
      for (T& v : y) v = round_to<T>(bits_to_float(0x7fc00000u));
    if (joined) store8<T, kVector>(joined + i, h - i, y);
    if (stream) store8<T, kVector>(stream + i, h - i, y);
  }
}

template <typename T> void head_input(const HeadInputParams& p, cudaStream_t s) {
  auto kernel = in_vectors(p.hidden, p.table, p.feature, p.token_weight, p.feature_weight, p.joined, p.stream) ? head_input_kernel<T, true> : head_input_kernel<T, false>;
  launch({dim3(p.rows, 2), dim3(kNormThreads), 0, s, 1, true}, kernel, p);
}

}  // namespace

void launch_head_input_cuda(const HeadInputParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? head_input<bf16>(p, s) : head_input<float>(p, s);
}

}  // namespace specrt

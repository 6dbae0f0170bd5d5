// What a draft head reads and keeps: rows gathered, normed and put side by side. A block a row and part (of head_input: the token's, or the feature's half).
#include "base/launch.h"
#include "norm/row.cuh"
#include "ptx/dependency.cuh"

namespace specrt {
namespace {

// Row x, or NaN where it is not known, to `first` after its norm and to `second` after its norm or as it is; both or neither may be null. By all threads of the block.
template <typename T, bool kVector>
__device__ __forceinline__ void write_row(const T* x, bool known, const RowWeight<T, kVector>& weight, int h, float eps, T* first, T* second, bool second_normed) {
  if (weight.all && known) {
    norm_row(x, weight, h, eps, [&](int i, const T (&y)[kVec]) {
      if (first) store8<T, kVector>(first + i, h - i, y);
      if (second && second_normed) store8<T, kVector>(second + i, h - i, y);
    });
    if (!second || second_normed) return;
    first = nullptr;  // what is left is the second
  }
  for (int i = kVec * threadIdx.x; i < h; i += kNormLanes) {
    T y[kVec];
    if (known) load8<T, kVector, true>(x + i, h - i, y);
    else
      for (T& v : y) v = round_to<T>(bits_to_float(0x7fc00000u));
    if (first) store8<T, kVector>(first + i, h - i, y);
    if (second) store8<T, kVector>(second + i, h - i, y);
  }
}

template <typename T, bool kVector> __global__ void __launch_bounds__(kNormThreads) head_input_kernel(HeadInputParams p) {
  ptx::launch_dependents();
  const int row = blockIdx.x, h = p.hidden;
  const bool of_token = blockIdx.y == 0;
  const RowWeight<T, kVector> weight(static_cast<const T*>(of_token ? p.token_weight : p.feature_weight), h);
  if (!p.early) ptx::grid_dependency_wait();
  const int rows = __ldcg(p.num_rows);  // and what comes next: loads at once
  const int64_t from = of_token ? __ldcg(p.ids + row) : p.parent ? __ldcg(p.parent + row) : row;
  if (row < rows) {
    const bool known = from >= 0 && from < (of_token ? p.vocab : p.features);
    const T* x = static_cast<const T*>(of_token ? p.table : p.feature) + from * h;
    T* joined = static_cast<T*>(p.joined) + (2 * static_cast<int64_t>(row) + (of_token == p.feature_first)) * h;
    T* stream = of_token || !p.stream ? nullptr : static_cast<T*>(p.stream) + static_cast<int64_t>(row) * h;
    write_row(x, known, weight, h, p.eps, joined, stream, p.stream_normed);
  }
  if (p.early) ptx::grid_dependency_wait();  // who waits for this kernel relies on the one before it too
}

template <typename T, bool kVector> __global__ void __launch_bounds__(kNormThreads) join_rows_kernel(const __grid_constant__ JoinRowsParams p) {
  ptx::launch_dependents();
  const int row = blockIdx.x, part = blockIdx.y, h = p.hidden;
  const RowWeight<T, kVector> weight(static_cast<const T*>(p.weights[part]), h);
  ptx::grid_dependency_wait();
  const int rows = *p.num_rows;
  const int64_t from = p.source ? p.source[row] : row;
  if (row >= rows) return;
  const bool missing = from == -1 && p.missing, known = missing || (from >= 0 && from < p.features);
  const T* x = missing ? static_cast<const T*>(p.missing) + static_cast<int64_t>(part) * h : static_cast<const T*>(p.parts[part]) + from * h;
  write_row(x, known, weight, h, p.eps, static_cast<T*>(p.out) + (static_cast<int64_t>(row) * p.count + part) * h, static_cast<T*>(nullptr), false);
}

template <typename T, bool kVector> __global__ void __launch_bounds__(kNormThreads) keep_rows_kernel(KeepRowsParams p) {
  ptx::launch_dependents();
  const int row = blockIdx.x, h = p.hidden;
  const RowWeight<T, kVector> weight(static_cast<const T*>(p.weight), h);
  ptx::grid_dependency_wait();
  const int rows = *p.num_rows;
  const int64_t place = p.place[row];
  if (row >= rows || place < 0 || place >= p.places) return;
  T* stream = p.stream ? static_cast<T*>(p.stream) + place * h : nullptr;
  write_row(static_cast<const T*>(p.x) + static_cast<int64_t>(row) * h, true, weight, h, p.eps, static_cast<T*>(p.normed) + place * h, stream, p.stream_normed);
}

template <typename T> void head_input(const HeadInputParams& p, cudaStream_t s) {
  auto kernel = in_vectors(p.hidden, p.table, p.feature, p.token_weight, p.feature_weight, p.joined, p.stream) ? head_input_kernel<T, true> : head_input_kernel<T, false>;
  launch({dim3(p.rows, 2), dim3(kNormThreads), 0, s, 1, true}, kernel, p);
}
template <typename T> void join_rows(const JoinRowsParams& p, cudaStream_t s) {
  bool vectors = in_vectors(p.hidden, p.missing, p.out);
  for (int part = 0; part < p.count; ++part) vectors = vectors && in_vectors(p.hidden, p.parts[part], p.weights[part]);
  launch({dim3(p.rows, p.count), dim3(kNormThreads), 0, s, 1, true}, vectors ? join_rows_kernel<T, true> : join_rows_kernel<T, false>, p);
}
template <typename T> void keep_rows(const KeepRowsParams& p, cudaStream_t s) {
  auto kernel = in_vectors(p.hidden, p.x, p.weight, p.normed, p.stream) ? keep_rows_kernel<T, true> : keep_rows_kernel<T, false>;
  launch({dim3(p.rows), dim3(kNormThreads), 0, s, 1, true}, kernel, p);
}

}  // namespace

void launch_head_input_cuda(const HeadInputParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? head_input<bf16>(p, s) : head_input<float>(p, s);
}

void launch_join_rows_cuda(const JoinRowsParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? join_rows<bf16>(p, s) : join_rows<float>(p, s);
}

void launch_keep_rows_cuda(const KeepRowsParams& p, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  p.dtype == DType::kBF16 ? keep_rows<bf16>(p, s) : keep_rows<float>(p, s);
}

}  // namespace specrt

// Device memory of the benchmarks: owned buffers, random contents, poison, checks. Everything here ends before it returns, but for enqueue_*.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/types.h"

namespace specrt::bench {

// "NVIDIA H100 80GB HBM3". Throws where there is no GPU.
std::string card_name();
int processors();
int compute_capability();  // 90 for 9.0
size_t free_memory();      // bytes

inline size_t bytes_of(DType type) { return type == DType::kBF16 ? 2 : 4; }

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // throws with both sizes where it does not fit
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }

  size_t bytes() const { return bytes_; }
  template <typename T = void> T* as() const { return static_cast<T*>(data_); }
  char* at(size_t byte) const { return static_cast<char*>(data_) + byte; }

 private:
  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

template <typename T> Buffer upload(const std::vector<T>& values) {
  Buffer buffer(values.size() * sizeof(T));
  SPECRT_CUDA_CHECK(cudaMemcpy(buffer.as(), values.data(), buffer.bytes(), cudaMemcpyHostToDevice));
  SPECRT_CUDA_CHECK(cudaDeviceSynchronize());  // a small copy may return before it has arrived
  return buffer;
}

// A copy of `count` elements at `from`, after all work on the device.
template <typename T> std::vector<T> download(const void* from, size_t count) {
  std::vector<T> values(count);
  SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
  SPECRT_CUDA_CHECK(cudaMemcpy(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

// Gaussian numbers times `scale`, a function of (seed, index) alone.
void fill_random(void* to, DType type, size_t count, uint32_t seed, float scale = 1.0f);
Buffer random_buffer(DType type, size_t count, uint32_t seed, float scale = 1.0f);
// Every byte 0xff: NaN in both float types.
void poison(void* to, size_t bytes);
size_t count_not_finite(const void* from, DType type, size_t count);

// Keeps the GPU busy for about a millisecond, so that what is enqueued after it has been handed over before it starts.
void enqueue_delay(cudaStream_t stream);

// The largest |got - reference| / |reference| over consecutive vectors of `length` (Euclidean norms); infinite where something is NaN.
double worst_relative_error(const std::vector<double>& got, const std::vector<double>& reference, size_t length);

}  // namespace specrt::bench

#include "common/device.h"

#include <cmath>
#include <limits>

#include "base/noise.h"

namespace specrt::bench {
namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  SPECRT_CUDA_CHECK(cudaGetDevice(&device));
  SPECRT_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Four words of Philox give four numbers, by Box and Muller.
template <typename T> __global__ void fill_kernel(T* to, int64_t count, uint32_t seed, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; 4 * i < count; i += step) {
    uint32_t words[4];
    philox4x32(seed, 0u, static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0u, 0u, words);
    float values[4];
    for (int pair = 0; pair < 4; pair += 2) {
      const float u = (static_cast<float>(words[pair]) + 0.5f) * 2.3283064365386963e-10f, radius = sqrtf(-2.0f * __logf(fminf(u, 1.0f)));
      float sine, cosine;
      sincospif(static_cast<float>(words[pair + 1]) * 4.656612873077393e-10f, &sine, &cosine);
      values[pair] = radius * cosine * scale;
      values[pair + 1] = radius * sine * scale;
    }
    for (int j = 0; j < 4; ++j)
      if (4 * i + j < count) to[4 * i + j] = round_to<T>(values[j]);
  }
}

template <typename T> __global__ void not_finite_kernel(const T* from, int64_t count, unsigned long long* found) {
  unsigned long long here = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) here += isfinite(to_float(from[i])) ? 0 : 1;
  if (here) atomicAdd(found, here);
}

__global__ void delay_kernel(long long nanoseconds) {
  long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  while (now - begin < nanoseconds);
}

}  // namespace

std::string card_name() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) fail("no CUDA GPU was found (is there a driver?)");
  cudaDeviceProp properties;
  SPECRT_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  return properties.name;
}

int processors() { return attribute(cudaDevAttrMultiProcessorCount); }
int compute_capability() { return attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor); }

size_t free_memory() {
  size_t free = 0, total = 0;
  SPECRT_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (cudaMalloc(&data_, bytes) == cudaSuccess) return;
  cudaGetLastError();
  fail("cannot allocate " + std::to_string(bytes / 1000000) + " MB on the GPU, which has " + std::to_string(free_memory() / 1000000) + " MB free");
}

Buffer::~Buffer() { cudaFree(data_); }

void fill_random(void* to, DType type, size_t count, uint32_t seed, float scale) {
  const int blocks = processors() * 8;
  if (type == DType::kBF16) fill_kernel<<<blocks, 256>>>(static_cast<bf16*>(to), static_cast<int64_t>(count), seed, scale);
  else fill_kernel<<<blocks, 256>>>(static_cast<float*>(to), static_cast<int64_t>(count), seed, scale);
  SPECRT_CHECK_LAUNCH();
  SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
}

Buffer random_buffer(DType type, size_t count, uint32_t seed, float scale) {
  Buffer buffer(count * bytes_of(type));
  fill_random(buffer.as(), type, count, seed, scale);
  return buffer;
}

void poison(void* to, size_t bytes) {
  SPECRT_CUDA_CHECK(cudaMemset(to, 0xff, bytes));
  SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
}

size_t count_not_finite(const void* from, DType type, size_t count) {
  const Buffer found(sizeof(unsigned long long));
  SPECRT_CUDA_CHECK(cudaMemset(found.as(), 0, found.bytes()));
  SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
  const int blocks = processors() * 8;
  if (type == DType::kBF16) not_finite_kernel<<<blocks, 256>>>(static_cast<const bf16*>(from), static_cast<int64_t>(count), found.as<unsigned long long>());
  else not_finite_kernel<<<blocks, 256>>>(static_cast<const float*>(from), static_cast<int64_t>(count), found.as<unsigned long long>());
  SPECRT_CHECK_LAUNCH();
  return download<unsigned long long>(found.as(), 1)[0];
}

void enqueue_delay(cudaStream_t stream) {
  delay_kernel<<<1, 1, 0, stream>>>(1000000);
  SPECRT_CHECK_LAUNCH();
}

double worst_relative_error(const std::vector<double>& got, const std::vector<double>& reference, size_t length) {
  double worst = 0;
  for (size_t begin = 0; begin + length <= got.size(); begin += length) {
    double error = 0, norm = 0;
    for (size_t i = begin; i < begin + length; ++i) {
      error += (got[i] - reference[i]) * (got[i] - reference[i]);
      norm += reference[i] * reference[i];
    }
    if (!(error <= std::numeric_limits<double>::max())) return std::numeric_limits<double>::infinity();
    worst = std::fmax(worst, std::sqrt(error / std::fmax(norm, 1e-30)));
  }
  return worst;
}

}  // namespace specrt::bench

#include "common/read.h"

#include <cstdio>

#include "base/launch.h"

namespace specrt::bench {
namespace {

// Every thread folds what it reads into one word. The store never happens in practice (one word in 2^32 has this value); it keeps the loads alive.
template <int kUnroll> __global__ void read_kernel(const uint4* data, int64_t count, uint32_t* sink) {
  uint32_t fold = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; base < count; base += kUnroll * step) {
    uint4 held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) held[u] = base + u * step < count ? __ldcs(data + base + u * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) fold ^= held[u].x ^ held[u].y ^ held[u].z ^ held[u].w;
  }
  if (fold == 0x9e3779b9u) *sink = fold;
}

struct ReadShape {
  int blocks, threads;  // blocks an SM
  void (*kernel)(const uint4*, int64_t, uint32_t*);
};
const ReadShape kShapes[] = {{1, 1024, read_kernel<4>}, {2, 1024, read_kernel<4>}, {1, 1024, read_kernel<8>}, {2, 512, read_kernel<8>},
                             {4, 512, read_kernel<4>},  {8, 256, read_kernel<4>},  {4, 256, read_kernel<8>},  {16, 128, read_kernel<4>}};

void enqueue_read(const ReadShape& shape, const void* from, size_t bytes, cudaStream_t stream, uint32_t* sink) {
  launch({dim3(processors() * shape.blocks), dim3(shape.threads), 0, stream}, shape.kernel, static_cast<const uint4*>(from), static_cast<int64_t>(bytes / 16), sink);
}

}  // namespace

Timing time_reads(const std::vector<const void*>& regions, size_t bytes, const Flush* flush) {
  const Buffer sink(sizeof(uint32_t));
  Timing best{1e30, 0};
  for (const ReadShape& shape : kShapes) {
    const Timing timing = time_graph(
        [&](cudaStream_t stream) {
          for (const void* region : regions) enqueue_read(shape, region, bytes, stream, sink.as<uint32_t>());
        },
        [&](cudaStream_t stream) {
          if (flush) (*flush)(stream);
        });
    if (timing.seconds < best.seconds) best = timing;
  }
  best.seconds /= static_cast<double>(regions.size());
  return best;
}

double measure_read_bandwidth() {
  const size_t bytes = std::min<size_t>(size_t{8} << 30, free_memory() / 10 * 8) / 4096 * 4096;
  const Buffer data = random_buffer(DType::kF32, bytes / 4, 1);
  const Timing timing = time_reads({data.as()}, bytes);
  const double bandwidth = static_cast<double>(bytes) / timing.seconds;
  std::printf("%s: read bandwidth %.0f GB/s over %.1f GB (spread %.1f%%)\n", card_name().c_str(), bandwidth / 1e9, static_cast<double>(bytes) / 1e9, timing.spread * 100);
  std::fflush(stdout);
  return bandwidth;
}

Flush::Flush() : buffer_(random_buffer(DType::kF32, kColdBytes / 4 + 4, 2)) {}

void Flush::operator()(cudaStream_t stream) const {
  enqueue_read(kShapes[1], buffer_.as(), kColdBytes, stream, buffer_.as<uint32_t>() + kColdBytes / 4);
}

}  // namespace specrt::bench

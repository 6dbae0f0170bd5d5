// Times of CUDA graph replays, by events on the device.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "common/device.h"

namespace specrt::bench {

struct Timing {
  double seconds, spread;  // median of the replays; (max - min) / median
};

inline Timing summary(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const size_t n = times.size();
  const double median = n % 2 ? times[n / 2] : (times[n / 2 - 1] + times[n / 2]) / 2;
  return {median, median > 0 ? (times[n - 1] - times[0]) / median : 0};
}

constexpr int kReplays = 12, kWarmUps = 3;

// Captures `enqueue(stream)` in a graph and times its replays. `prepare(stream)` comes before each replay and is not timed; after it the stream is kept
// busy while the replay is handed over, so that the host's time to do so is not counted.
template <typename Enqueue, typename Prepare> Timing time_graph(Enqueue&& enqueue, Prepare&& prepare, int replays = kReplays) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  SPECRT_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  SPECRT_CUDA_CHECK(cudaEventCreate(&begin));
  SPECRT_CUDA_CHECK(cudaEventCreate(&end));
  prepare(stream);
  enqueue(stream);  // eagerly first: modules are loaded and attributes set outside of the capture
  SPECRT_CUDA_CHECK(cudaStreamSynchronize(stream));
  SPECRT_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(stream);
  SPECRT_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  SPECRT_CUDA_CHECK(cudaGraphInstantiate(&replay, graph, 0));
  SPECRT_CUDA_CHECK(cudaGraphUpload(replay, stream));
  std::vector<double> times;
  for (int i = 0; i < kWarmUps + replays; ++i) {
    prepare(stream);
    enqueue_delay(stream);
    SPECRT_CUDA_CHECK(cudaEventRecord(begin, stream));
    SPECRT_CUDA_CHECK(cudaGraphLaunch(replay, stream));
    SPECRT_CUDA_CHECK(cudaEventRecord(end, stream));
    SPECRT_CUDA_CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    SPECRT_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= kWarmUps) times.push_back(milliseconds * 1e-3);
  }
  SPECRT_CUDA_CHECK(cudaGraphExecDestroy(replay));
  SPECRT_CUDA_CHECK(cudaGraphDestroy(graph));
  SPECRT_CUDA_CHECK(cudaEventDestroy(begin));
  SPECRT_CUDA_CHECK(cudaEventDestroy(end));
  SPECRT_CUDA_CHECK(cudaStreamDestroy(stream));
  return summary(times);
}

template <typename Enqueue> Timing time_graph(Enqueue&& enqueue) {
  return time_graph(enqueue, [](cudaStream_t) {});
}

}  // namespace specrt::bench

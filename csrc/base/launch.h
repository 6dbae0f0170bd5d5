// One way to launch a kernel: grid, stream, cluster, programmatic dependent launch.
#pragma once
#include <cuda_runtime.h>

#include "base/check.h"

namespace specrt {

struct Launch {
  dim3 grid, block;
  int shared_bytes = 0;
  cudaStream_t stream = nullptr;
  int cluster = 1;         // CTAs of a cluster, along x
  bool dependent = false;  // may start before the stream's earlier kernels end (ptx/dependency.cuh says what the kernel owes then)
};

template <typename... Params, typename... Args> void launch(const Launch& at, void (*kernel)(Params...), const Args&... args) {
  if (at.shared_bytes > 48 * 1024) SPECRT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.shared_bytes));
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = at.stream;
  config.attrs = attributes;
  // Kernels whose preferences differ never share an SM: all ask for the largest part of it as shared memory.
  attributes[config.numAttrs].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[config.numAttrs++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  if (at.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(at.cluster), 1, 1};
  }
  if (at.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  SPECRT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

inline int multiprocessors() {
  int card = 0, count = 0;
  SPECRT_CUDA_CHECK(cudaGetDevice(&card));
  SPECRT_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, card));
  return count;
}

}  // namespace specrt

// Launch and runtime errors of the kernels library, as exceptions (it knows no torch).
#pragma once
#include <stdexcept>
#include <string>

namespace specrt {
[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }
}  // namespace specrt

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SPECRT_CUDA_CHECK(call)                                                                                    \
  do {                                                                                                             \
    cudaError_t status_ = (call);                                                                                  \
    if (status_ != cudaSuccess)                                                                                    \
      ::specrt::fail(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + cudaGetErrorString(status_)); \
  } while (0)
// After every kernel launch: catches a bad configuration at once (no synchronisation).
#define SPECRT_CHECK_LAUNCH() SPECRT_CUDA_CHECK(cudaGetLastError())
#endif

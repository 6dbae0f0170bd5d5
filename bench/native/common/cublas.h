// cuBLAS as the peer of the linear layers, found at run time: nothing is linked, no header of it is needed.
#pragma once
#include <cuda_runtime.h>

#include <memory>
#include <string>

#include "common/device.h"

namespace specrt::bench {

class Cublas {
 public:
  // `where`: libcublas.so.N or its folder; "": the folder in SPECRT_CUBLAS, the loader's paths, /usr/local/cuda/lib64. Null where none is found;
  // throws where `where` is given and does not load.
  static std::unique_ptr<Cublas> open(const std::string& where);
  ~Cublas();

  // out[M, N] = x[M, K] weight[N, K]^T in bf16, fp32 accumulation; out in bf16 or fp32.
  void linear(cudaStream_t stream, const void* x, const void* weight, void* out, DType out_type, int M, int N, int K) const;
  const std::string& version() const { return version_; }

 private:
  Cublas() = default;
  struct Functions;
  std::unique_ptr<Functions> f_;
  void* handle_ = nullptr;
  Buffer workspace_;
  std::string version_;
};

}  // namespace specrt::bench

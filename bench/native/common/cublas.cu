#include "common/cublas.h"

#include <dlfcn.h>

#include <cstdlib>
#include <vector>

namespace specrt::bench {
namespace {

// Values of cublas_api.h and library_types.h, the same since CUDA 11.
constexpr int kOpN = 0, kOpT = 1, kBf16 = 14, kFloat = 0, kCompute32F = 68, kGemmDefault = -1;

template <typename F> F symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (!found) fail(std::string("cuBLAS has no ") + name);
  return reinterpret_cast<F>(found);
}

void check(int status, const char* call) {
  if (status) fail(std::string(call) + ": cuBLAS status " + std::to_string(status));
}

// libcublas of `folder` ("": the loader's paths). Its libcublasLt is loaded first, from the same place.
void* load(const std::string& folder, std::string& errors) {
  for (const char* major : {"13", "12"}) {
    const std::string prefix = folder.empty() ? "" : folder + "/";
    if (!dlopen((prefix + "libcublasLt.so." + major).c_str(), RTLD_NOW | RTLD_GLOBAL)) {
      errors += std::string(dlerror()) + "; ";
      continue;
    }
    if (void* library = dlopen((prefix + "libcublas.so." + major).c_str(), RTLD_NOW | RTLD_GLOBAL)) return library;
    errors += std::string(dlerror()) + "; ";
  }
  return nullptr;
}

}  // namespace

struct Cublas::Functions {
  int (*create)(void**);
  int (*destroy)(void*);
  int (*version)(void*, int*);
  int (*set_stream)(void*, cudaStream_t);
  int (*set_workspace)(void*, void*, size_t);
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*, int, int, int, int);
};

std::unique_ptr<Cublas> Cublas::open(const std::string& where) {
  std::vector<std::string> folders;
  if (!where.empty()) {
    const size_t slash = where.rfind('/');
    const bool file = where.find("libcublas.so") != std::string::npos;
    folders = {!file ? where : slash == std::string::npos ? "." : where.substr(0, slash)};
  } else {
    if (const char* named = std::getenv("SPECRT_CUBLAS")) folders.push_back(named);
    folders.insert(folders.end(), {"", "/usr/local/cuda/lib64"});
  }
  void* library = nullptr;
  std::string errors;
  for (const std::string& folder : folders)
    if ((library = load(folder, errors))) break;
  if (!library) {
    if (!where.empty()) fail("--cublas " + where + ": " + errors);
    return nullptr;
  }
  std::unique_ptr<Cublas> cublas(new Cublas);
  cublas->f_.reset(new Functions{symbol<decltype(Functions::create)>(library, "cublasCreate_v2"), symbol<decltype(Functions::destroy)>(library, "cublasDestroy_v2"),
                                 symbol<decltype(Functions::version)>(library, "cublasGetVersion_v2"),
                                 symbol<decltype(Functions::set_stream)>(library, "cublasSetStream_v2"),
                                 symbol<decltype(Functions::set_workspace)>(library, "cublasSetWorkspace_v2"),
                                 symbol<decltype(Functions::gemm)>(library, "cublasGemmEx")});
  check(cublas->f_->create(&cublas->handle_), "cublasCreate");
  int version = 0;
  check(cublas->f_->version(cublas->handle_, &version), "cublasGetVersion");
  cublas->version_ = std::to_string(version);
  cublas->workspace_ = Buffer(size_t{64} << 20);
  return cublas;
}

Cublas::~Cublas() {
  if (handle_) f_->destroy(handle_);
}

void Cublas::linear(cudaStream_t stream, const void* x, const void* weight, void* out, DType out_type, int M, int N, int K) const {
  check(f_->set_stream(handle_, stream), "cublasSetStream");  // it forgets the workspace
  check(f_->set_workspace(handle_, workspace_.as(), workspace_.bytes()), "cublasSetWorkspace");
  const float one = 1.0f, zero = 0.0f;
  // Column-major: out^T [N, M] = (weight^T)^T x^T.
  check(f_->gemm(handle_, kOpT, kOpN, N, M, K, &one, weight, kBf16, K, x, kBf16, K, &zero, out, out_type == DType::kBF16 ? kBf16 : kFloat, N, kCompute32F, kGemmDefault),
        "cublasGemmEx");
}

}  // namespace specrt::bench

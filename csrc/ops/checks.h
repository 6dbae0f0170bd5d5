// Argument checks of the bindings: shapes with named sizes, dtypes, device, contiguity. A message says which op and argument, what it
// got and what it would accept. No knowledge of any op.
#pragma once
#include <initializer_list>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "base/types.h"

namespace specrt::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A size shared by several arguments of one call: the first use fixes it.
struct Sym {
  explicit Sym(const char* name_) : name(name_) {}
  const char* name;
  int64_t value = -1;
  operator int64_t() const { return value; }
};

struct Dim {
  Dim(Sym& s) : sym(&s) {}
  Dim(int64_t v) : fixed(v) {}
  Sym* sym = nullptr;
  int64_t fixed = -1;
};

class Checker {
 public:
  Checker(const char* op, const Tensor& first);
  // Checks one argument; ScalarTypes lists what is accepted (empty: anything).
  void operator()(const char* arg, const Tensor& t, std::initializer_list<Dim> shape, std::initializer_list<ScalarType> dtypes);
  void operator()(const char* arg, const std::optional<Tensor>& t, std::initializer_list<Dim> shape, std::initializer_list<ScalarType> dtypes) {
    if (t.has_value()) (*this)(arg, *t, shape, dtypes);
  }
  // A condition on values or sizes: `what` says what would be accepted.
  void require(bool condition, const char* arg, const std::string& what) const;
  // The scale of a key/value pool: 1 unless that is e4m3.
  void pool_scale(const char* arg, double scale, const Tensor& pool) const;
  // CUDA kernels copy 16 bytes at a time from and to these.
  void aligned(const char* arg, const Tensor& t) const;
  bool cuda() const { return cuda_; }
  Device device() const;  // with the current stream of the tensors' device

 private:
  [[noreturn]] void refuse(const char* arg, const std::string& got, const std::string& want) const;
  const char* op_;
  bool cuda_;
  int index_;
};

inline constexpr ScalarType kF32 = ScalarType::Float, kBF16 = ScalarType::BFloat16, kI32 = ScalarType::Int, kI64 = ScalarType::Long, kU8 = ScalarType::Byte,
                            kE4M3 = ScalarType::Float8_e4m3fn;

inline DType dtype_of(const Tensor& t) { return t.scalar_type() == kBF16 ? DType::kBF16 : t.scalar_type() == kE4M3 ? DType::kE4M3 : DType::kF32; }

template <typename T> const T* in(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <typename T> const T* in(const std::optional<Tensor>& t) { return t.has_value() ? in<T>(*t) : nullptr; }
template <typename T> T* inout(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }
template <typename T> T* inout(const std::optional<Tensor>& t) { return t.has_value() ? inout<T>(*t) : nullptr; }

inline constexpr int64_t kMaxVocab = 1 << 19;  // block statistics of a row fit the default shared memory
inline constexpr const char* kVocabText = "a vocabulary of at most 524288 tokens";

// Without CUDA kernels in the build, or without a CUDA torch, a CUDA tensor is refused by name.
[[noreturn]] void no_cuda(const char* op);

}  // namespace specrt::ops

// Runs launch_<name>_cuda(params, stream) or launch_<name>_cpu(params): every launcher of the rooms has this pair of names.
#ifdef SPECRT_TORCH_CUDA
#define SPECRT_LAUNCH(name, check, params)                                                            \
  do {                                                                                                \
    if ((check).cuda()) launch_##name##_cuda(params, (check).device().stream);                        \
    else launch_##name##_cpu(params);                                                                 \
  } while (0)
#else
#define SPECRT_LAUNCH(name, check, params)                                                            \
  do {                                                                                                \
    if ((check).cuda()) ::specrt::ops::no_cuda(#name);                                                \
    else launch_##name##_cpu(params);                                                                 \
  } while (0)
#endif

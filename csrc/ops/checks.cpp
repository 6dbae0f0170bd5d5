#include "ops/checks.h"

#include <cmath>
#include <stdexcept>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#ifdef SPECRT_TORCH_CUDA
// The stable C shim declares it only for torch's own CUDA builds (USE_CUDA), whose headers a CPU build must not see.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace specrt::ops {
namespace {

const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

std::string shape_text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

std::string want_text(std::initializer_list<Dim> shape) {
  std::string s = "[", known;
  int i = 0;
  for (const Dim& d : shape) {
    s += i++ ? ", " : "";
    if (!d.sym) { s += std::to_string(d.fixed); continue; }
    s += d.sym->name;
    if (d.sym->value >= 0) known += std::string(known.empty() ? " with " : ", ") + d.sym->name + " = " + std::to_string(d.sym->value);
  }
  return s + "]" + known;
}

}  // namespace

Checker::Checker(const char* op, const Tensor& first) : op_(op), cuda_(first.is_cuda()), index_(cuda_ ? first.get_device_index() : -1) {}

void Checker::refuse(const char* arg, const std::string& got, const std::string& want) const {
  std::string message = std::string("specrt::") + op_ + ": argument '" + arg + "': got " + got + ", want " + want;
  throw std::runtime_error(message);
}

void Checker::operator()(const char* arg, const Tensor& t, std::initializer_list<Dim> shape, std::initializer_list<ScalarType> dtypes) {
  if (t.is_cuda() != cuda_ || (cuda_ && t.get_device_index() != index_)) refuse(arg, t.is_cuda() ? "a CUDA tensor" : "a CPU tensor", "a tensor on the device of the first argument");
  bool typed = dtypes.size() == 0;
  std::string accepted;
  for (ScalarType s : dtypes) {
    typed = typed || t.scalar_type() == s;
    accepted += (accepted.empty() ? "" : " or ") + std::string(name_of(s));
  }
  if (!typed) refuse(arg, name_of(t.scalar_type()), accepted);
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const Dim& d : shape) {
    if (!fits) break;
    int64_t size = t.size(i++);
    if (d.sym && d.sym->value < 0) d.sym->value = size;
    fits = size == (d.sym ? d.sym->value : d.fixed);
  }
  if (!fits) refuse(arg, "shape " + shape_text(t), "shape " + want_text(shape));
  if (!t.is_contiguous()) refuse(arg, "a strided view", "a contiguous tensor");
}

void Checker::require(bool condition, const char* arg, const std::string& what) const {
  if (!condition) refuse(arg, "a value out of range", what);
}

void Checker::pool_scale(const char* arg, double scale, const Tensor& pool) const {
  const float rounded = static_cast<float>(scale);
  if (pool.scalar_type() == kE4M3 ? !(std::isfinite(rounded) && rounded > 0.0f) : scale != 1.0)
    refuse(arg, std::to_string(scale), pool.scalar_type() == kE4M3 ? "a finite number > 0" : "1: only a float8_e4m3fn pool has a scale");
}

void Checker::aligned(const char* arg, const Tensor& t) const {
  if (cuda_ && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) refuse(arg, "a view that begins inside 16 bytes", "a 16-byte aligned address on CUDA");
}

Device Checker::device() const {
  Device d{cuda_, nullptr};
#ifdef SPECRT_TORCH_CUDA
  if (cuda_) TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &d.stream));
#endif
  return d;
}

void no_cuda(const char* op) {
  std::string message = std::string("specrt::") + op + ": this build has no CUDA kernels (no nvcc or a CPU-only torch when it was built); use device=\"cpu\"";
  throw std::runtime_error(message);
}

}  // namespace specrt::ops

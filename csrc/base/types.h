// Host and device vocabulary: element types and the letters every room uses.
//
//   B requests (slots)    N tree nodes a request    R packed rows (capacity)   Hq/Hkv query/KV heads   D head dim
//   V vocabulary          P page size               L layers                   H hidden                I intermediate
//
// "num_rows" is always a pointer to one int32 on the device: how many of the R packed rows are in use. Rows past it are
// neither read nor written, so that the host never has to know the number.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SPECRT_HD __host__ __device__ __forceinline__
#else
#define SPECRT_HD inline __attribute__((always_inline))
#endif

namespace specrt {

enum class DType : int { kF32, kBF16, kE4M3 };

// bfloat16 as stored: the upper half of a float32. Rounding is to nearest even, NaN stays NaN.
struct bf16 {
  uint16_t bits;
};

SPECRT_HD float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
SPECRT_HD float to_float(float x) { return x; }

SPECRT_HD bf16 to_bf16(float f) {
  bf16 out;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(f));  // the same, but for the bits of a NaN
#else
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded);
#endif
  return out;
}

template <typename T> struct Rounder;
template <> struct Rounder<float> { static SPECRT_HD float round(float x) { return x; } };
template <> struct Rounder<bf16> { static SPECRT_HD bf16 round(float x) { return to_bf16(x); } };
// Round to the storage type T (the rounding point after every op).
template <typename T> SPECRT_HD T round_to(float x) { return Rounder<T>::round(x); }

// Where an op runs: `stream` is a cudaStream_t when cuda, unused otherwise.
struct Device {
  bool cuda = false;
  void* stream = nullptr;
};

}  // namespace specrt

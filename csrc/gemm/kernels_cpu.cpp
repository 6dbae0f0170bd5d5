#include "gemm/kernels_cpu.h"

#include "base/math.h"
#include "base/parallel.h"
#include "gemm/params.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace specrt {
namespace {

// --- portable: the definition ---

SPECRT_HD float step(float acc, const bf16* x, const bf16* w) { return fma_rn(to_float(x[0]), to_float(w[0]), fma_rn(to_float(x[1]), to_float(w[1]), acc)); }
SPECRT_HD float step(float acc, const float* x, const float* w) { return fma_rn(x[0], w[0], acc); }

template <typename T, int rows> SPECRT_CLONES void portable(const void* x, int64_t stride, const char* weight, int steps, float* acc, Prefetch) {
  constexpr int g = 4 / sizeof(T);
  for (int s = 0; s < steps; ++s) {
    const T* w = reinterpret_cast<const T*>(weight) + static_cast<int64_t>(s) * kPanel * g;
    for (int r = 0; r < rows; ++r) {
      T xs[g];
      memcpy(xs, static_cast<const char*>(x) + r * stride + s * 4, 4);
      for (int o = 0; o < kPanel; ++o) acc[r * kPanel + o] = step(acc[r * kPanel + o], xs, w + o * g);
    }
  }
}

template <typename T> constexpr StepKernels kPortable = {{portable<T, 1>, portable<T, 2>, portable<T, 3>, portable<T, 4>, portable<T, 5>, portable<T, 6>}};

// --- AVX-512 ---

#if defined(__x86_64__)
#define SPECRT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"), always_inline)) inline
#define SPECRT_AVX512_KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

template <typename T> SPECRT_AVX512 __m512 step512(__m512 acc, __m512i x, __m512i w);
template <> SPECRT_AVX512 __m512 step512<float>(__m512 acc, __m512i x, __m512i w) { return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), acc); }
template <> SPECRT_AVX512 __m512 step512<bf16>(__m512 acc, __m512i x, __m512i w) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}

template <typename T, int rows> SPECRT_AVX512_KERNEL void avx512(const void* x, int64_t stride, const char* weight, int steps, float* acc, Prefetch next) {
  __m512 sum[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_load_ps(acc + r * kPanel + v * 16);
  const char* at = static_cast<const char*>(x);
  for (int s = 0; s < steps; ++s, at += 4, weight += kStepBytes) {
    for (int l = 0; l < next.lines; ++l, next.from += 64) _mm_prefetch(next.from, _MM_HINT_T0);
    __m512i w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w[v] = _mm512_loadu_si512(weight + v * 64);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      memcpy(&pair, at + r * stride, 4);
      const __m512i xs = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[r][v] = step512<T>(sum[r][v], xs, w[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_ps(acc + r * kPanel + v * 16, sum[r][v]);
}

template <typename T> constexpr StepKernels kAvx512 = {{avx512<T, 1>, avx512<T, 2>, avx512<T, 3>, avx512<T, 4>, avx512<T, 5>, avx512<T, 6>}};
#endif

}  // namespace

const StepKernels& portable_step_kernels(DType dtype) { return dtype == DType::kBF16 ? kPortable<bf16> : kPortable<float>; }

const StepKernels& step_kernels(DType dtype) {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  static const bool bf16_dot = avx512 && __builtin_cpu_supports("avx512bf16");
  if (dtype == DType::kF32 && avx512) return kAvx512<float>;
  if (dtype == DType::kBF16 && bf16_dot) return kAvx512<bf16>;
#endif
  return portable_step_kernels(dtype);
}

}  // namespace specrt

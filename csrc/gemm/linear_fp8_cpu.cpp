// FP8 linear on the CPU. A block of 128 k of a panel is widened to bfloat16, which is exact, into 16 KB that stay in the L1 cache; the bfloat16 kernels then take it for all rows of
// the unit, and each row's sums are promoted. Only half the bytes come from memory. No product of two e4m3 values is below 2^-18, nor is a sum of them but zero: the hardware's dot
// product, which flushes denormals, and the portable code give the same bits.
#include <cstring>
#include <memory>

#include "gemm/blocks_cpu.h"
#include "gemm/finish_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace specrt {
namespace {

constexpr int kBlockSteps = kScaleBlock / 2;              // pairs of k in a block
constexpr int kBlockBytes = kScaleBlock * kPanel;         // of a packed panel
constexpr int kPrefetch = 2 * kBlockBytes;                // how far ahead of the widening the weights are asked for

SPECRT_CLONES void widen_portable(const e4m3* from, bf16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i].bits = static_cast<uint16_t>(float_to_bits(to_float(from[i])) >> 16);
}

#if defined(__x86_64__)
// The two bytes of each bfloat16 are looked up by the seven bits of the magnitude. 64 values at a time; count % 64 == 0.
struct Tables {
  alignas(64) uint8_t low[128], high[128];
  Tables() {
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = float_to_bits(to_float(e4m3{static_cast<uint8_t>(i)}));
      low[i] = static_cast<uint8_t>(bits >> 16), high[i] = static_cast<uint8_t>(bits >> 24);
    }
  }
};

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi"))) void widen_vbmi(const e4m3* from, bf16* to, int64_t count) {
  static const Tables tables;
  const __m512i low0 = _mm512_load_si512(tables.low), low1 = _mm512_load_si512(tables.low + 64), high0 = _mm512_load_si512(tables.high), high1 = _mm512_load_si512(tables.high + 64);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), sign = _mm512_set1_epi8(static_cast<char>(0x80));  // the order that unpacking undoes
  for (int64_t i = 0; i < count; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + i) + kPrefetch, _MM_HINT_T0);  // past the end it is harmless
    const __m512i x = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + i));
    const __m512i low = _mm512_permutex2var_epi8(low0, x, low1), magnitude = _mm512_permutex2var_epi8(high0, x, high1);
    const __m512i high = _mm512_ternarylogic_epi64(magnitude, x, sign, 0xf8);  // magnitude | (x & sign)
    _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
  }
}
#endif

using Widen = void (*)(const e4m3* from, bf16* to, int64_t count);

// Of packed weights: steps of 128 values.
Widen weight_widener() {
#if defined(__x86_64__)
  static const bool vbmi = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi");
  if (vbmi) return widen_vbmi;
#endif
  return widen_portable;
}

SPECRT_CLONES void promote(const float* sum, float x_scale, const float* weight_scale, float* acc) {
  for (int o = 0; o < kPanel; ++o) acc[o] = fma_rn(sum[o], x_scale * weight_scale[o], acc[o]);
}

// Rows [row, row + count) of one panel. x: the widened rows, [rows, 2 * steps].
template <typename T>
void panel_block(const LinearFp8Params& fp8, const StepKernels& kernels, Widen widen, const bf16* x, const float* scales, int64_t steps, int64_t panel, int64_t row, int count) {
  const LinearParams& p = fp8.linear;
  const int64_t first = panel * kPanel, blocks = (p.in_features + kScaleBlock - 1) / kScaleBlock;
  const int outputs = static_cast<int>(std::min<int64_t>(kPanel, p.out_features - first));
  const e4m3* weight = static_cast<const e4m3*>(p.weight) + first * steps * 2;
  alignas(64) float acc[kRowBlock * kPanel], sums[kMaxRows * kPanel], weight_scale[kPanel] = {};
  alignas(64) bf16 wide[kScaleBlock * kPanel];
  std::memset(acc, 0, sizeof(float) * kPanel * count);
  for (int64_t b = 0; b < blocks; ++b) {
    const int n = static_cast<int>(std::min<int64_t>(kBlockSteps, steps - b * kBlockSteps));
    widen(weight + b * kBlockBytes, wide, static_cast<int64_t>(n) * 2 * kPanel);
    if (b == 0 || fp8.weight_blocks > 1) std::memcpy(weight_scale, fp8.weight_scale + b * p.out_features + first, sizeof(float) * outputs);
    for (int r = 0; r < count; r += kMaxRows) {
      const int m = std::min(kMaxRows, count - r);
      std::memset(sums, 0, sizeof(float) * kPanel * m);
      kernels.rows[m - 1](x + ((row + r) * steps + b * kBlockSteps) * 2, steps * 4, reinterpret_cast<const char*>(wide), n, sums, {nullptr, 0});
      for (int i = 0; i < m; ++i) promote(sums + i * kPanel, fp8.x_scale[b * scale_pitch(p.rows) + row + r + i], weight_scale, acc + (r + i) * kPanel);
    }
  }
  for (int r = 0; r < count; ++r) finish_row<T, T, float>(p, scales, row + r, panel, acc + r * kPanel);
}

template <typename T> void linear_fp8(const LinearFp8Params& fp8) {
  const LinearParams& p = fp8.linear;
  const int64_t n = std::min(*p.num_rows, p.rows), k = p.in_features, steps = (k + 1) / 2;
  if (n <= 0) return;
  std::unique_ptr<bf16[]> x(new bf16[n * steps * 2]);
  parallel_for(n, n * k * 2, [&](int64_t r) {
    widen_portable(static_cast<const e4m3*>(p.x) + r * k, x.get() + r * steps * 2, k);
    if (k % 2) x[r * steps * 2 + k] = bf16{0};
  });
  const StepKernels& kernels = step_kernels(DType::kBF16);
  const Widen widen = weight_widener();
  const auto scales = row_scales(p, n);
  for_each_block(p.out_features, kPanel, n, k, sizeof(bf16),
                 [&](int64_t panel, int64_t row, int count) { panel_block<T>(fp8, kernels, widen, x.get(), scales.get(), steps, panel, row, count); });
}

}  // namespace

void launch_linear_fp8_cpu(const LinearFp8Params& p) { p.linear.out_dtype == DType::kF32 ? linear_fp8<float>(p) : linear_fp8<bf16>(p); }

}  // namespace specrt

// Compares the kernels that this processor runs with the portable ones, which are the definition: every bit, over random inputs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "gemm/kernels_cpu.h"

using namespace specrt;

int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const int steps = 700;
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    std::vector<uint32_t> x(kMaxRows * steps), w(steps * kStepBytes / 4);
    for (std::vector<uint32_t>* v : {&x, &w})
      for (uint32_t& word : *v) {
        float f = std::ldexp(normal(random), static_cast<int>(random() % 9) - 4), g = normal(random);
        if (dtype == DType::kBF16) word = to_bf16(f).bits | static_cast<uint32_t>(to_bf16(g).bits) << 16;
        else std::memcpy(&word, &f, 4);
      }
    for (int m = 1; m <= kMaxRows; ++m) {
      alignas(64) float fast[kMaxRows * 64] = {}, plain[kMaxRows * 64] = {};
      const Prefetch none{reinterpret_cast<const char*>(w.data()), 0};
      step_kernels(dtype).rows[m - 1](x.data(), steps * 4, reinterpret_cast<const char*>(w.data()), steps, fast, none);
      portable_step_kernels(dtype).rows[m - 1](x.data(), steps * 4, reinterpret_cast<const char*>(w.data()), steps, plain, none);
      if (std::memcmp(fast, plain, sizeof fast) != 0 || fast[0] == 0) {
        std::printf("dtype %d, %d rows: the kernels differ (first output %a and %a)\n", static_cast<int>(dtype), m, fast[0], plain[0]);
        return 1;
      }
    }
  }
  return 0;
}

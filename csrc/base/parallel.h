// The CPU backend's two helpers: a parallel loop, and function clones for wide vectors.
#pragma once
#include <cstdint>

// Compiles a function for AVX-512, AVX2 and the baseline, chosen at load. The clones give the same bits: contraction is off, and a
// written fma is one rounding in hardware and in libm alike.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPECRT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPECRT_CLONES
#endif

namespace specrt {

// fn(i) for i in [0, n), on all threads if `work` (scalar operations in all) is worth waking them (about 10 us).
template <typename F> void parallel_for(int64_t n, int64_t work, F&& fn) {
#pragma omp parallel for schedule(static) if (n > 1 && work > 65536)
  for (int64_t i = 0; i < n; ++i) fn(i);
}

}  // namespace specrt

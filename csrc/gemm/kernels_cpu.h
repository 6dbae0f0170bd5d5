// The inner kernels of linear on the CPU: some rows times one panel of 64 outputs, over some steps of k. A step is 4 bytes of a row (one float32
// or two bfloat16) and 256 bytes of the packed panel.
#pragma once
#include "base/types.h"

namespace specrt {

constexpr int kStepBytes = 256;
constexpr int kMaxRows = 6;  // 6 rows x 64 outputs: 24 of the 32 registers of AVX-512

// Weights to bring near while computing: `lines` cache lines a step.
struct Prefetch {
  const char* from;
  int lines;
};

// acc [rows, 64] continued by `steps` steps of k. x: the rows' elements at the first step, `stride` bytes apart.
using StepKernel = void (*)(const void* x, int64_t stride, const char* weight, int steps, float* acc, Prefetch next);

struct StepKernels {
  StepKernel rows[kMaxRows];  // rows[m - 1] takes m rows
};

// The best kernels this processor can run, and the portable ones: bit for bit the same on normal numbers (params.h).
const StepKernels& step_kernels(DType dtype);
const StepKernels& portable_step_kernels(DType dtype);

}  // namespace specrt

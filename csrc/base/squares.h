// The statistics of a deferred RMSNorm: who writes a row h also writes its sums of squares by blocks of 64 columns, who reads it makes r = 1 / rms of them.
//
// Order: in a block, quads of columns, one fma chain each from zero, ascending; neighbouring quads fold pairwise until one is left (columns past the row's end
// count as zero). Over the row, lane i of 32 sums blocks 4i .. 4i+3, then 128 further on, ... in one chain from zero, ascending; then a butterfly
// (16, 8, 4, 2, 1: lane i += lane i^d). r = 1 / sqrt(sum / width + eps).
#pragma once
#include <cmath>

#include "base/math.h"

namespace specrt {

constexpr int kSquareBlock = 64;

SPECRT_HD int square_blocks(int width) { return (width + kSquareBlock - 1) / kSquareBlock; }
// Floats from a row's sums to the next one's: whole 16 bytes.
SPECRT_HD int square_pitch(int width) { return (square_blocks(width) + 3) / 4 * 4; }

SPECRT_HD float quad_squares(const float (&h)[4]) { return fma_rn(h[3], h[3], fma_rn(h[2], h[2], fma_rn(h[1], h[1], h[0] * h[0]))); }

SPECRT_HD float row_scale(float sum, int width, float eps) { return 1.0f / sqrtf(sum / static_cast<float>(width) + eps); }

// Of one block on the CPU; `columns` <= 64 of it exist.
template <typename T> SPECRT_HD float block_squares(const T* h, int columns) {
  float quads[16];
  for (int q = 0; q < 16; ++q) {
    float x[4];
    for (int e = 0; e < 4; ++e) x[e] = 4 * q + e < columns ? to_float(h[4 * q + e]) : 0.0f;
    quads[q] = quad_squares(x);
  }
  for (int n = 8; n; n /= 2)
    for (int q = 0; q < n; ++q) quads[q] = quads[2 * q] + quads[2 * q + 1];
  return quads[0];
}

// r of a row on the CPU.
inline float row_scale(const float* squares, int width, float eps) {
  float lanes[32] = {};
  for (int b = 0; b < square_blocks(width); ++b) lanes[b / 4 % 32] = lanes[b / 4 % 32] + squares[b];
  for (int d = 16; d; d /= 2)
    for (int i = 0; i < d; ++i) lanes[i] = lanes[i] + lanes[i + d];
  return row_scale(lanes[0], width, eps);
}

}  // namespace specrt

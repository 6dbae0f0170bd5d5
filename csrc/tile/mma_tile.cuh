// Tiles of 64 bfloat16 columns in shared memory, swizzled: filled from row-major global memory by cp.async, multiplied by tensor cores.
//
// A tile row is 128 bytes, 8 chunks of 16; chunk c of row r lies at place c ^ (r % 8), so that the 8 rows an ldmatrix reads at one logical chunk
// fall in 8 different bank groups, and so do the 8 chunks of a row that neighbouring threads copy.
#pragma once
#include "base/types.h"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"

namespace specrt::tile {

constexpr int kTileColumns = 64, kTileRowBytes = kTileColumns * 2;

__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int row, int chunk) { return tile + row * kTileRowBytes + ((chunk ^ (row & 7)) << 4); }

// Starts the copy of `rows` rows from `first`, columns [column, column + 64), of the row-major matrix [valid_rows, columns] by `threads`
// threads. Rows and columns outside the matrix become zeros and are not read. columns % 8 == 0, `matrix` 16-byte aligned, `tile` 128.
template <int threads>
__device__ __forceinline__ void copy_tile(uint32_t tile, const bf16* matrix, int first, int rows, int valid_rows, int column, int columns, int thread) {
  const int chunk = thread & 7, k = column + chunk * 8;
#pragma unroll 4
  for (int r = thread >> 3; r < rows; r += threads / 8) {
    const bool valid = first + r < valid_rows && k < columns;
    ptx::cp_async_16(chunk_address(tile, r, chunk), valid ? matrix + static_cast<int64_t>(first + r) * columns + k : matrix, valid);
  }
}

// acc[i][j] += A_i B_j^T over the 64 columns in steps of 16, ascending: A_i are 16 rows of the tile `a` from row 16 i, B_j 8 rows of the tile `b` from
// row 8 j. Only j < active are computed. (A tile's rows start at a multiple of 8, for the swizzle.) Whole warp; element layout as in ptx/mma.cuh.
template <int MT, int NT> __device__ __forceinline__ void multiply_tiles(uint32_t a, uint32_t b, int active, float (&acc)[MT][NT][4]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 32 columns: two steps, one ldmatrix of B for both
    uint32_t bf[NT][4];
#pragma unroll
    for (int j = 0; j < NT; ++j)
      if (j < active) ptx::ldmatrix_x4(bf[j], chunk_address(b, 8 * j + (lane & 7), 4 * half + (lane >> 3)));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t af[MT][4];
#pragma unroll
      for (int i = 0; i < MT; ++i) ptx::ldmatrix_x4(af[i], chunk_address(a, 16 * i + (lane & 15), 4 * half + 2 * step + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < NT; ++j)
        if (j < active)
#pragma unroll
          for (int i = 0; i < MT; ++i) ptx::mma_m16n8k16_bf16(acc[i][j], af[i], bf[j][2 * step], bf[j][2 * step + 1]);
    }
  }
}

// Writes acc transposed: to[column of D * pitch + row of D], D the warp's [16 MT, 8 NT]. Without bank conflicts where pitch % 16 == 4.
template <int MT, int NT> __device__ __forceinline__ void store_transposed(const float (&acc)[MT][NT][4], int active, float* to, int pitch) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < NT; ++j)
    if (j < active)
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) to[(8 * j + 2 * t + (e & 1)) * pitch + 16 * i + g + 8 * (e >> 1)] = acc[i][j][e];
}

}  // namespace specrt::tile

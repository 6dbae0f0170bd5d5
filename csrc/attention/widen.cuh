// Tiles of e4m3 pools: a tensor copy brings one as it is, warps of the producer's warpgroup widen it where it lies, and those who multiply find a bf16 tile as ever.
//
// A place for a bf16 tile is blocks of [64 rows][64 columns], 128-byte rows swizzled (base/tensor_map.h). The e4m3 tile, [64 rows][128 columns] swizzled alike, comes to its
// last block: a row of it lies where the row's last columns go, so a row is read by the lanes of one warp before any of them writes.
#pragma once
#include <type_traits>

#include "attention/params.h"
#include "base/fp8.h"
#include "base/tensor_map.h"
#include "ptx/convert.cuh"
#include "ptx/shared.cuh"
#include "ptx/wgmma_registers.cuh"

namespace specrt {

// How a tile comes: in boxes of 128-byte rows, `boxes` side by side, the first at byte `at` of the tile's place.
template <typename KV, int Columns> struct Arrival {
  static constexpr bool fp8 = std::is_same_v<KV, e4m3>;
  static constexpr int boxes = fp8 ? 1 : Columns / 64, at = fp8 ? (Columns / 64 - 1) * kTile * 128 : 0;
};

template <typename Tile> CUtensorMap pool_map(const AttentionParams& p, const void* pool, int box_rows) {
  const int rows = p.pages * p.kv_heads * p.page;
  return Tile::fp8 ? tensor_map_e4m3(pool, rows, p.head_dim, box_rows) : tensor_map_bf16(pool, rows, p.head_dim, box_rows);
}

constexpr int kWideners = 3;  // warps that share a tile

// By each of the warps, 0 <= warp < kWideners: 8 rows at a time, a lane 8 columns of some of them. A chunk of row r ^ x, x < 8, lies at the place ^ x of that of row r.
template <int Columns> __device__ __forceinline__ void widen_tile(uint32_t place, unsigned warp, unsigned lane) {
  constexpr unsigned kPieces = Columns / 8, kSteps = kPieces / 4, kStep = 8 / kSteps;
  const unsigned piece = lane % kPieces, first = lane / kPieces;
  uint32_t from = place + (Columns / 64 - 1) * kTile * 128 + (8 * warp + first) * 128 + ((piece / 2) ^ first) * 16 + piece % 2 * 8;
  uint32_t to = place + piece / 8 * kTile * 128 + (8 * warp + first) * 128 + ((piece % 8) ^ first) * 16;
#pragma unroll 1
  for (unsigned row = 8 * warp; row < kTile; row += 8 * kWideners) {
    uint2 narrow[kSteps];
#pragma unroll
    for (unsigned j = 0; j < kSteps; ++j) narrow[j] = ptx::load_shared((from ^ (j * kStep * 16)) + j * kStep * 128);
    __syncwarp();
#pragma unroll
    for (unsigned j = 0; j < kSteps; ++j) ptx::store_shared((to ^ (j * kStep * 16)) + j * kStep * 128, ptx::widen_e4m3(narrow[j]));
    uint32_t nans = 0;
#pragma unroll
    for (unsigned j = 0; j < kSteps; ++j) nans |= ptx::e4m3_nans(narrow[j]);
    if (nans)  // once more, out of everybody else's way
#pragma unroll
      for (unsigned j = 0; j < kSteps; ++j) ptx::store_shared((to ^ (j * kStep * 16)) + j * kStep * 128, ptx::mark_nans(ptx::widen_e4m3(narrow[j])));
    from += 8 * kWideners * 128;
    to += 8 * kWideners * 128;
  }
  ptx::async_proxy_fence();
  __syncwarp();
}

}  // namespace specrt

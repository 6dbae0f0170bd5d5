// Tensor maps: how the bulk copy engine is told about a row-major matrix.
#pragma once
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "base/check.h"

namespace specrt {

// The driver's encoder, found at run time: nothing links against libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    SPECRT_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    if (status != cudaDriverEntryPointSuccess) fail("this driver has no cuTensorMapEncodeTiled (CUDA 12.0 or later is needed)");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return encoder;
}

// A bf16 matrix [rows, columns], rows contiguous, in boxes of [box_rows, 64] whose rows of 128 bytes are swizzled: the 16-byte chunk c of row r lies at
// place c ^ (r % 8). columns % 8 == 0, 16-byte aligned; box_rows <= 256.
inline CUtensorMap tensor_map_bf16(const void* matrix, int rows, int columns, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, strides[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult status = tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
  return map;
}

// An e4m3 matrix [rows, columns], rows contiguous, in boxes of [box_rows, 128] whose rows of 128 bytes are swizzled: the 16-byte chunk c of row r lies at
// place c ^ (r % 8). columns % 16 == 0, 16-byte aligned; box_rows <= 256.
inline CUtensorMap tensor_map_e4m3(const void* matrix, int rows, int columns, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, strides[1] = {static_cast<cuuint64_t>(columns)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult status = tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
  return map;
}

}  // namespace specrt

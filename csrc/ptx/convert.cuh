// 2^x and 1 / x by the special function unit, and packed conversions.
#pragma once
#include <cstdint>

namespace specrt::ptx {

// ex2.approx.ftz: 2 ulp; 2^-inf = 0; a subnormal result is 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz: 1 ulp.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx: 1 ulp; a subnormal result is kept.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// {low, high} as a pair of e4m3, in the lower 16 bits: to nearest even, saturated to +-448, NaN gives 0x7f.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// {low, high} as a pair of bf16, rounded to nearest even.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Two e4m3, bytes `first` and first + 1 of four, as bf16, exactly; a NaN gives +-480. A byte below its sign eight times, moved to bf16's places, is the value times 2^-120.
template <int first> __device__ __forceinline__ uint32_t widen_e4m3_pair(uint32_t four) {
  constexpr uint32_t kSelect = first ? 0xb3a2u : 0x9180u, kScale = 0x7b807b80u;  // 8 in a place of kSelect: the byte's sign; 2^120 twice
  uint32_t pair;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(pair) : "r"(four), "n"(kSelect));  // __byte_perm knows no signs
  pair = (pair << 4) & 0x87f087f0u;
  asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(kScale));
  return pair;
}

// Eight e4m3 as bf16, exactly; a NaN gives +-480.
__device__ __forceinline__ uint4 widen_e4m3(uint2 x) { return {widen_e4m3_pair<0>(x.x), widen_e4m3_pair<2>(x.x), widen_e4m3_pair<0>(x.y), widen_e4m3_pair<2>(x.y)}; }

// A sign bit is set where one of them is NaN.
__device__ __forceinline__ uint32_t e4m3_nans(uint2 x) { return (((x.x & 0x7f7f7f7fu) + 0x01010101u) | ((x.y & 0x7f7f7f7fu) + 0x01010101u)) & 0x80808080u; }

// What widen_e4m3 gave, with NaN for +-480.
__device__ __forceinline__ uint4 mark_nans(uint4 wide) {
  auto mark = [](uint32_t pair) { return pair | (__vcmpeq2(pair & 0x7fff7fffu, 0x43f043f0u) & 0x7fc07fc0u); };
  return {mark(wide.x), mark(wide.y), mark(wide.z), mark(wide.w)};
}

}  // namespace specrt::ptx

// Shared memory by its address.
#pragma once
#include <cstdint>

namespace specrt::ptx {

// Four floats to a multiple of 16 bytes as one store, which the compiler does not make of what it cannot prove aligned.
__device__ __forceinline__ void store_shared(uint32_t to, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

}  // namespace specrt::ptx

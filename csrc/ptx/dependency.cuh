// Programmatic dependent launch (sm_90): a kernel may start while the one before it in the stream still runs.
//
// A kernel launched with the attribute (base/launch.h) must call grid_dependency_wait in every thread before it touches what an earlier kernel
// wrote, and before it writes what an earlier kernel may still read. Weights are neither: they may be read before. What is older than the kernel before may be too, where that
// one is sure to have waited (linear, which starts the next late); where it is done, a params.h says so (kv, attention), and the loads go to L2: an SM's L1 may hold what was.
#pragma once

namespace specrt::ptx {

// Returns when every earlier kernel of the stream is complete and its writes are visible; at once in an ordinary launch.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel of the stream start, where it may, as soon as every CTA of this one has called this or ended.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace specrt::ptx

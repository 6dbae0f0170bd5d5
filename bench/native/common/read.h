// A pure read: what the memory allows, as the floor of everything that has to read the same bytes.
#pragma once
#include <vector>

#include "common/timing.h"

namespace specrt::bench {

// What must lie between two uses of the same bytes for them to come from memory: four times the 50 MB of a Hopper card's L2.
constexpr size_t kColdBytes = 200u << 20;
// How many copies of `bytes` make them cold in turn; at least `least`.
inline int cold_copies(size_t bytes, int least = 8) { return static_cast<int>(std::max<size_t>(static_cast<size_t>(least), kColdBytes / bytes + 1)); }

// Reads a buffer of kColdBytes, so that nothing else is left in L2: a `prepare` for time_graph.
class Flush {
 public:
  Flush();
  void operator()(cudaStream_t stream) const;

 private:
  Buffer buffer_;
};

// Graph-timed reads of `bytes` (a multiple of 16) at each of `regions`, one kernel node a region; seconds a region, the best of several launch shapes.
// `flush`: for regions that are too small to push one another out of L2.
Timing time_reads(const std::vector<const void*>& regions, size_t bytes, const Flush* flush = nullptr);

// Bytes a second over 8 GiB of random bits, or over what fits. Prints it.
double measure_read_bandwidth();

}  // namespace specrt::bench

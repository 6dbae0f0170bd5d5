// What a launch costs, and how large a read must be to reach the memory's rate: the facts that every other figure stands on.
//
// graph_node*: a chain of empty kernels in one graph, time a node: plain; with programmatic dependent launch (each may start while the one before it runs, lets the next one
// start at once, and waits for its predecessors); as clusters of 4 CTAs. read_*: cold reads of one region, one kernel each.
#include <cstdio>

#include "base/launch.h"
#include "common/arguments.h"
#include "common/read.h"
#include "common/report.h"
#include "ptx/dependency.cuh"

namespace specrt::bench {
namespace {

constexpr int kNodes = 1000;

__global__ void empty_kernel() {}

__global__ void dependent_kernel() {
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
}

struct Node {
  std::string name;
  void (*kernel)();
  int cluster;
  bool dependent, wide;  // wide: a CTA an SM, else one (one cluster)
};
const Node kNodeCases[] = {{"graph_node", empty_kernel, 1, false, false},
                           {"graph_node_wide", empty_kernel, 1, false, true},
                           {"graph_node_dependent", dependent_kernel, 1, true, false},
                           {"graph_node_dependent_wide", dependent_kernel, 1, true, true},
                           {"graph_node_cluster", empty_kernel, 4, false, false},
                           {"graph_node_cluster_wide", empty_kernel, 4, false, true}};

struct Read {
  std::string name;
  size_t bytes;
};
const Read kReadCases[] = {{"read_4mb", 4000000}, {"read_34mb", 34000000}, {"read_117mb", 117000000}, {"read_268mb", 268000000}, {"read_8gb", 8000000000}};

Row measure(const Node& node) {
  const int ctas = node.wide ? processors() / node.cluster * node.cluster : node.cluster;
  const Timing timing = time_graph([&](cudaStream_t stream) {
    for (int i = 0; i < kNodes; ++i) launch({dim3(ctas), dim3(128), 0, stream, node.cluster, node.dependent}, node.kernel);
  });
  Row row;
  row.name = node.name;
  row.shape = std::to_string(ctas) + " CTAs of 128 threads" + (node.cluster > 1 ? ", clusters of " + std::to_string(node.cluster) : "");
  row.seconds = timing.seconds / kNodes;
  row.spread = timing.spread;
  return row;
}

Row measure(const Read& read, double bandwidth) {
  const int copies = cold_copies(read.bytes, read.bytes < 1000000000 ? 4 : 1);
  const Buffer data = random_buffer(DType::kF32, read.bytes / 4 * copies, 50);
  std::vector<const void*> regions;
  for (int copy = 0; copy < copies; ++copy) regions.push_back(data.at(read.bytes * copy));
  const Timing timing = time_reads(regions, read.bytes);
  Row row;
  row.name = read.name;
  row.shape = std::to_string(read.bytes / 1000000) + " MB";
  row.seconds = timing.seconds;
  row.spread = timing.spread;
  row.bytes = static_cast<double>(read.bytes);
  row.floor = row.bytes / bandwidth;
  return row;
}

bool measure_all(int argc, char** argv) {
  std::vector<std::string> names;
  for (const Node& node : kNodeCases) names.push_back(node.name);
  for (const Read& read : kReadCases) names.push_back(read.name);
  const Arguments arguments(argc, argv, "bench_launch: kernel nodes of a CUDA graph, and reads of growing size; us.", names);
  if (arguments.answered()) return true;
  const std::string card = card_name();
  if (compute_capability() < 90) fail("programmatic dependent launch and clusters need compute capability 9.0; this is a " + card);
  const double bandwidth = measure_read_bandwidth();
  Report report(arguments.value("--json", ""), card, bandwidth);
  for (const Node& node : kNodeCases)
    if (arguments.wants(node.name)) report.add(measure(node));
  for (const Read& read : kReadCases)
    if (arguments.wants(read.name)) report.add(measure(read, bandwidth));
  return report.all_correct();
}

}  // namespace
}  // namespace specrt::bench

int main(int argc, char** argv) {
  return specrt::bench::run("bench_launch", [&] { return specrt::bench::measure_all(argc, argv); });
}

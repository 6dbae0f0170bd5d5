// The small ops around attention: q/k norm + rotary embedding + append to pages, the commit of accepted paths in all layers, RMSNorm with the residual.
// Llama-3.1-8B's shape: 32/8 heads of 128, hidden 4096, 32 layers, page 64.
//
// Each op runs on many copies of its data in one graph, after a read of 200 MB that leaves nothing of them in L2. floor: a graph-timed pure read of the bytes that
// the op reads and writes. Checked on the host, on the last copy.
#include <cmath>
#include <cstdio>

#include "common/arguments.h"
#include "common/read.h"
#include "common/report.h"
#include "kv/params.h"
#include "norm/params.h"

namespace specrt::bench {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kDim = 128, kPage = 64, kHidden = 4096, kLayers = 32, kCopies = 32;
constexpr double kTolerance = 1e-2;  // of bf16 results, rounded up to three times

double as_double(bf16 x) { return static_cast<double>(to_float(x)); }

// A pure read of so many bytes.
double floor_of(size_t bytes, const Flush& flush) {
  const size_t rounded = (bytes + 15) / 16 * 16;
  const Buffer data = random_buffer(DType::kF32, rounded / 4 * kCopies, 40);
  std::vector<const void*> regions;
  for (int copy = 0; copy < kCopies; ++copy) regions.push_back(data.at(rounded * copy));
  return time_reads(regions, rounded, &flush).seconds;
}

template <typename Enqueue> Row timed(const std::string& name, const std::string& shape, int copies, size_t bytes, bool correct, const std::string& checks, Enqueue&& enqueue) {
  const Flush flush;
  const Timing timing = time_graph([&](cudaStream_t stream) { for (int copy = 0; copy < copies; ++copy) enqueue(copy, stream); }, flush);
  Row row;
  row.name = name;
  row.shape = shape;
  row.seconds = timing.seconds / copies;
  row.spread = timing.spread;
  row.bytes = static_cast<double>(bytes);
  row.floor = floor_of(bytes, flush);
  row.correct = correct;
  row.checks = checks;
  return row;
}

std::string verdict(double error) {
  char text[64];
  std::snprintf(text, sizeof text, "error %.1e%s", error, error <= kTolerance ? "" : ", WRONG");
  return text;
}

// --- append ---

Row append(const std::string& name, int rows) {
  constexpr int kAll = kHeads + 2 * kKvHeads, kMaxPosition = 4096, kPages = 8;
  const size_t qkv_elements = static_cast<size_t>(rows) * kAll * kDim, q_bytes = static_cast<size_t>(rows) * kHeads * kDim * 2;
  const size_t pool_bytes = static_cast<size_t>(kPages) * kKvHeads * kPage * kDim * 2;
  const Buffer qkv = random_buffer(DType::kBF16, qkv_elements * kCopies, 41), q(q_bytes * kCopies), pools(2 * pool_bytes * kCopies);
  const Buffer q_norm = random_buffer(DType::kBF16, kDim, 42), k_norm = random_buffer(DType::kBF16, kDim, 43), count = upload<int32_t>({rows});
  std::vector<float> cosines, sines;
  for (int position = 0; position < kMaxPosition; ++position)
    for (int i = 0; i < kDim / 2; ++i) {
      const double angle = position * std::pow(500000.0, -2.0 * i / kDim);
      cosines.push_back(static_cast<float>(std::cos(angle)));
      sines.push_back(static_cast<float>(std::sin(angle)));
    }
  const Buffer cosine = upload(cosines), sine = upload(sines);
  std::vector<int32_t> positions(rows);
  std::vector<int64_t> slots(rows);
  for (int r = 0; r < rows; ++r) positions[r] = 1000 + r, slots[r] = r * 7 % (kPages * kPage);  // all different: 7 and 512 have no common factor
  const Buffer position = upload(positions), slot = upload(slots);
  auto enqueue = [&](int copy, cudaStream_t stream) {
    RopeAppendParams p{};
    p.dtype = p.kv_dtype = DType::kBF16;
    p.qkv = qkv.at(qkv_elements * 2 * copy);
    p.positions = position.as<int32_t>();
    p.slots = slot.as<int64_t>();
    p.cos = cosine.as<float>();
    p.sin = sine.as<float>();
    p.q_norm = q_norm.as();
    p.k_norm = k_norm.as();
    p.eps = 1e-6f;
    p.num_rows = count.as<int32_t>();
    p.q = q.at(q_bytes * copy);
    p.k_pool = pools.at(2 * pool_bytes * copy);
    p.v_pool = pools.at(2 * pool_bytes * copy + pool_bytes);
    p.rows = rows;
    p.q_heads = kHeads;
    p.kv_heads = kKvHeads;
    p.head_dim = kDim;
    p.page = kPage;
    p.max_position = kMaxPosition;
    launch_rope_append_cuda(p, stream);
  };

  const int copy = kCopies - 1, r = rows - 1;
  poison(q.as(), q.bytes());
  poison(pools.as(), pools.bytes());
  enqueue(copy, nullptr);
  const std::vector<bf16> x = download<bf16>(qkv.at((qkv_elements * copy + static_cast<size_t>(r) * kAll * kDim) * 2), kAll * kDim);
  const std::vector<bf16> got_q = download<bf16>(q.at(q_bytes * copy + static_cast<size_t>(r) * kHeads * kDim * 2), kHeads * kDim);
  const std::vector<bf16> pool = download<bf16>(pools.at(2 * pool_bytes * copy), pool_bytes);  // K, then V
  const std::vector<bf16> weights[2] = {download<bf16>(q_norm.as(), kDim), download<bf16>(k_norm.as(), kDim)};
  std::vector<double> got, reference;
  for (int head = 0; head < kAll; ++head) {
    const bf16* in = x.data() + head * kDim;
    const bool is_q = head < kHeads, is_v = head >= kHeads + kKvHeads;
    const int kv_head = is_q ? 0 : (head - kHeads) % kKvHeads;
    const size_t at = (is_v ? pool_bytes / 2 : 0) + ((static_cast<size_t>(slots[r] / kPage) * kKvHeads + kv_head) * kPage + slots[r] % kPage) * kDim;
    const bf16* out = is_q ? got_q.data() + head * kDim : pool.data() + at;
    double square = 0, normed[kDim];
    for (int i = 0; i < kDim; ++i) square += as_double(in[i]) * as_double(in[i]);
    for (int i = 0; i < kDim; ++i) normed[i] = is_v ? as_double(in[i]) : as_double(in[i]) / std::sqrt(square / kDim + 1e-6) * as_double(weights[is_q ? 0 : 1][i]);
    for (int i = 0; i < kDim; ++i) {
      const int pair = i % (kDim / 2);
      const double c = cosines[static_cast<size_t>(positions[r]) * kDim / 2 + pair], s = sines[static_cast<size_t>(positions[r]) * kDim / 2 + pair];
      reference.push_back(is_v ? normed[i] : i < kDim / 2 ? normed[i] * c - normed[i + kDim / 2] * s : normed[i] * c + normed[i - kDim / 2] * s);
      got.push_back(as_double(out[i]));
    }
  }
  const double error = worst_relative_error(got, reference, kDim);
  return timed(name, "32/8 heads of 128, q/k norm + rope + append", kCopies, 4 * qkv_elements, error <= kTolerance, verdict(error), enqueue);
}

// --- commit ---

Row commit(const std::string& name, int requests) {
  constexpr int kSeqLen = 100, kNodes = 64, kMaxPages = 3, kDeep = 5;  // 100 + 64 slots in 3 pages; a path of root and 4 nodes, each moved
  const int32_t way[kDeep] = {0, 2, 5, 11, 40};
  const int copies = 4, pages = requests * kMaxPages;
  const size_t layer_elements = static_cast<size_t>(pages) * kKvHeads * kPage * kDim, pool_bytes = layer_elements * 2 * kLayers;
  const Buffer pools = random_buffer(DType::kBF16, layer_elements * kLayers * 2 * copies, 44);
  std::vector<int32_t> table(pages), path(requests * kNodes, -1);
  for (int i = 0; i < pages; ++i) table[i] = pages - 1 - i;
  for (int b = 0; b < requests; ++b)
    for (int i = 0; i < kDeep; ++i) path[b * kNodes + i] = way[i];
  const Buffer tables = upload(table), paths = upload(path), lengths = upload(std::vector<int32_t>(requests, kDeep)), seq_lens = upload(std::vector<int32_t>(requests, kSeqLen));
  auto enqueue = [&](int copy, cudaStream_t stream) {
    KvCommitParams p{};
    p.dtype = DType::kBF16;
    p.k_pools = pools.at(2 * pool_bytes * copy);
    p.v_pools = pools.at(2 * pool_bytes * copy + pool_bytes);
    p.block_table = tables.as<int32_t>();
    p.seq_lens = seq_lens.as<int32_t>();
    p.path = paths.as<int32_t>();
    p.path_len = lengths.as<int32_t>();
    p.layers = kLayers;
    p.pages = pages;
    p.kv_heads = kKvHeads;
    p.page = kPage;
    p.head_dim = kDim;
    p.requests = requests;
    p.max_pages = kMaxPages;
    p.nodes = kNodes;
    launch_kv_commit_cuda(p, stream);
  };

  // The last layer's K and V, whole: the moved slots hold what they should, and nothing else changed.
  auto at = [&](int b, int slot, int head) { return ((static_cast<size_t>(table[b * kMaxPages + slot / kPage]) * kKvHeads + head) * kPage + slot % kPage) * kDim; };
  const char* layers[2];
  std::vector<uint16_t> expected[2];
  for (int kv = 0; kv < 2; ++kv) {
    layers[kv] = pools.at(2 * pool_bytes * (copies - 1) + kv * pool_bytes + layer_elements * 2 * (kLayers - 1));
    const std::vector<uint16_t> before = expected[kv] = download<uint16_t>(layers[kv], layer_elements);
    for (int b = 0; b < requests; ++b)
      for (int i = 1; i < kDeep; ++i)
        for (int head = 0; head < kKvHeads; ++head)
          for (int d = 0; d < kDim; ++d) expected[kv][at(b, kSeqLen + i, head) + d] = before[at(b, kSeqLen + way[i], head) + d];
  }
  enqueue(copies - 1, nullptr);
  const bool right = download<uint16_t>(layers[0], layer_elements) == expected[0] && download<uint16_t>(layers[1], layer_elements) == expected[1];
  const size_t bytes = static_cast<size_t>(kLayers) * 2 * requests * (kDeep - 1) * kKvHeads * kDim * 2 * 2;
  return timed(name, "32 layers, 8 KV heads of 128, 4 nodes moved", copies, bytes, right, right ? "pages as moved on the host" : "WRONG", enqueue);
}

// --- RMSNorm ---

Row rms_norm(const std::string& name, int rows) {
  const size_t elements = static_cast<size_t>(rows) * kHidden;
  const Buffer x = random_buffer(DType::kBF16, elements * kCopies, 45);
  const Buffer weight = random_buffer(DType::kBF16, kHidden, 47), out(elements * 2 * kCopies), count = upload<int32_t>({rows});
  auto enqueue = [&](int copy, cudaStream_t stream) {
    RmsNormParams p{};
    p.dtype = DType::kBF16;
    p.x = x.at(elements * 2 * copy);
    p.weight = weight.as();
    p.out = out.at(elements * 2 * copy);
    p.eps = 1e-5f;
    p.num_rows = count.as<int32_t>();
    p.rows = rows;
    p.hidden = kHidden;
    launch_rms_norm_cuda(p, stream);
  };

  const size_t last = (elements * (kCopies - 1) + static_cast<size_t>(rows - 1) * kHidden) * 2;
  const std::vector<bf16> in = download<bf16>(x.at(last), kHidden), w = download<bf16>(weight.as(), kHidden);
  poison(out.as(), out.bytes());
  enqueue(kCopies - 1, nullptr);
  const std::vector<bf16> result = download<bf16>(out.at(last), kHidden);
  std::vector<double> got, reference;
  double square = 0;
  for (int i = 0; i < kHidden; ++i) square += std::pow(as_double(in[i]), 2);
  for (int i = 0; i < kHidden; ++i) {
    reference.push_back(as_double(in[i]) / std::sqrt(square / kHidden + 1e-5) * as_double(w[i]));
    got.push_back(as_double(result[i]));
  }
  const double error = worst_relative_error(got, reference, kHidden);
  return timed(name, "hidden 4096", kCopies, elements * 2 * 2, error <= kTolerance, verdict(error), enqueue);
}

struct Case {
  std::string name;
  Row (*measure)(const std::string&, int);
  int size;
};
const Case kCases[] = {{"append_m1", append, 1},     {"append_m8", append, 8},     {"append_m64", append, 64},    {"commit_b1", commit, 1},
                       {"commit_b8", commit, 8},     {"rms_norm_m1", rms_norm, 1}, {"rms_norm_m8", rms_norm, 8}, {"rms_norm_m64", rms_norm, 64}};

bool measure_all(int argc, char** argv) {
  std::vector<std::string> names;
  for (const Case& row : kCases) names.push_back(row.name);
  const Arguments arguments(argc, argv, "bench_kv: append to the KV cache, commit of accepted paths, RMSNorm; us, cold.", names);
  if (arguments.answered()) return true;
  const std::string card = card_name();
  Report report(arguments.value("--json", ""), card, measure_read_bandwidth());
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) report.add(row.measure(row.name, row.size));
  return report.all_correct();
}

}  // namespace
}  // namespace specrt::bench

int main(int argc, char** argv) {
  return specrt::bench::run("bench_kv", [&] { return specrt::bench::measure_all(argc, argv); });
}

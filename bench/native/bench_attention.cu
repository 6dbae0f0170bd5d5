// Attention over paged KV, a layer, cold: decode rows, token trees, a prompt; bf16, or keys and values in e4m3 (fp8). 32 query and 8 KV heads of 128, page 64.
//
// floor: a graph-timed pure read of as many bytes as the visible K and V have. Every configuration is first compared with a float64 reference, and its last row with the
// same row computed alone by tree_attention: `==` on the bits.
#include <cstdio>
#include <random>

#include "attention/params.h"
#include "base/fp8.h"
#include "common/arguments.h"
#include "common/read.h"
#include "common/report.h"

namespace specrt::bench {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kDim = 128, kPage = 64;
constexpr double kTolerance = 1e-2;  // P and the output are rounded to bf16: about 2.5e-3 of a vector's norm

struct Case {
  std::string name;
  int batch, context, nodes;  // nodes 0: a prompt of `context` tokens
  bool fp8 = false;           // of the pools
};
const Case kCases[] = {{"decode_attention_b1_1k", 1, 1024, 1},      {"decode_attention_b1_16k", 1, 16384, 1},   {"decode_attention_b32_1k", 32, 1024, 1},
                       {"verify_attention_n64_b1_1k", 1, 1024, 64}, {"verify_attention_n64_b1_4k", 1, 4096, 64}, {"verify_attention_n64_b8_1k", 8, 1024, 64},
                       {"prefill_attention_4k", 1, 4096, 0},         {"decode_attention_fp8_b1_16k", 1, 16384, 1, true}, {"decode_attention_fp8_b32_1k", 32, 1024, 1, true},
                       {"verify_attention_fp8_n64_b1_4k", 1, 4096, 64, true}, {"prefill_attention_fp8_4k", 1, 4096, 0, true},
                       {"verify_attention_n64_b4_1k", 4, 1024, 64}, {"verify_attention_n64_b8_4k", 8, 4096, 64}};
constexpr float kKeyScale = 0.02f, kValueScale = 0.03f;  // of fp8 pools

__global__ void convert_kernel(const bf16* from, e4m3* to, int64_t count, float scale) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = to_e4m3(to_float(from[i]) / scale);
}

__device__ double element(const AttentionParams& p, const void* pool, int64_t at, float scale) {
  return p.kv_dtype == DType::kE4M3 ? static_cast<double>(to_float(static_cast<const e4m3*>(pool)[at])) * scale : static_cast<double>(to_float(static_cast<const bf16*>(pool)[at]));
}

// A block a (row, head): scores, their maximum, then a thread an element of the output.
__global__ void reference_kernel(AttentionParams p, const int2* samples, int most, double* scores, double* got, double* reference) {
  const int row = samples[blockIdx.x].x, head = samples[blockIdx.x].y, kv_head = head / (p.q_heads / p.kv_heads), request = p.row_request[row];
  const unsigned long long word = p.ancestors ? static_cast<unsigned long long>(p.ancestors[row]) : 0;
  const int prefix = p.row_prefix[row], len = prefix + __popcll(word);
  double* s = scores + static_cast<int64_t>(blockIdx.x) * most;
  auto offset = [&](int position) {
    int slot = position;
    if (position >= prefix) {
      unsigned long long rest = word;
      for (int i = prefix; i < position; ++i) rest &= rest - 1;
      slot = prefix + __ffsll(static_cast<long long>(rest)) - 1;
    }
    const int64_t page = p.block_table[static_cast<int64_t>(request) * p.max_pages + slot / p.page];
    return ((page * p.kv_heads + kv_head) * p.page + slot % p.page) * p.head_dim;
  };
  const int64_t vector = (static_cast<int64_t>(row) * p.q_heads + head) * p.head_dim;
  const bf16* q = static_cast<const bf16*>(p.q) + vector;
  for (int t = threadIdx.x; t < len; t += blockDim.x) {
    const int64_t key = offset(t);
    double sum = 0;
    for (int d = 0; d < p.head_dim; ++d) sum += static_cast<double>(to_float(q[d])) * element(p, p.k_pool, key + d, p.k_scale);
    s[t] = sum * static_cast<double>(p.scale);
  }
  __syncthreads();
  double top = -1e300, total = 0, out = 0;
  for (int t = 0; t < len; ++t) top = s[t] > top ? s[t] : top;
  for (int t = 0; t < len; ++t) {
    const double probability = exp(s[t] - top);
    total += probability;
    out += probability * element(p, p.v_pool, offset(t) + threadIdx.x, p.v_scale);
  }
  reference[blockIdx.x * kDim + threadIdx.x] = out / total;
  got[blockIdx.x * kDim + threadIdx.x] = to_float(static_cast<const bf16*>(p.out)[vector + threadIdx.x]);
}

// Nodes of a binary tree in breadth-first order: one word a node.
std::vector<int64_t> binary_tree(int nodes) {
  std::vector<int64_t> words{1};
  for (int i = 1; i < nodes; ++i) words.push_back(static_cast<int64_t>(static_cast<uint64_t>(words[(i - 1) / 2]) | uint64_t{1} << i));
  return words;
}

class Bench {
 public:
  explicit Bench(const Case& row) : case_(row), prompt_(row.nodes == 0), rows_(prompt_ ? row.context : row.batch * row.nodes) {
    const int seen = row.context + row.nodes;  // slots of a request that are read
    max_pages_ = (seen + kPage - 1) / kPage + 1;
    const size_t element_bytes = row.fp8 ? 1 : 2;
    visible_ = static_cast<size_t>(row.batch) * seen * kKvHeads * kDim * 2 * element_bytes;
    const size_t pages = static_cast<size_t>(row.batch) * max_pages_, elements = pages * kKvHeads * kPage * kDim;
    pool_bytes_ = elements * element_bytes;
    copies_ = cold_copies(visible_, prompt_ ? 4 : 8);
    pools_ = random_pools(elements);
    // Queries three times as long as keys: probabilities that are far from even, so that a missing key would show.
    q_ = random_buffer(DType::kBF16, static_cast<size_t>(rows_) * kHeads * kDim, 21, 3.0f);
    out_ = Buffer(q_.bytes());
    alone_ = Buffer(static_cast<size_t>(kHeads) * kDim * 2);
    std::vector<int32_t> table(pages), request(rows_), prefix(rows_);
    std::vector<int64_t> words(rows_);
    const std::vector<int64_t> tree = binary_tree(std::max(1, row.nodes));
    for (size_t i = 0; i < pages; ++i) table[i] = static_cast<int32_t>(i);
    std::shuffle(table.begin(), table.end(), std::mt19937(5));
    for (int r = 0; r < rows_; ++r) {
      request[r] = prompt_ ? 0 : r / row.nodes;
      prefix[r] = prompt_ ? r + 1 : row.context;
      words[r] = prompt_ ? 0 : tree[r % row.nodes];
    }
    table_ = upload(table);
    request_ = upload(request);
    prefix_ = upload(prefix);
    words_ = upload(words);
    counts_ = upload<int32_t>({rows_, 1});
    // ops.attention_workspace: (m, l, O) a row, head and chunk.
    const size_t chunks = (static_cast<size_t>(max_pages_) * kPage + kChunk - 1) / kChunk;
    plan_ = Buffer(static_cast<size_t>(plan_ints(rows_)) * sizeof(int32_t));
    workspace_ = Buffer(static_cast<size_t>(prompt_ ? 1 : rows_) * kHeads * chunks * (kDim + 2) * sizeof(float));
  }

  void measure(Report& report) const {
    Row out;
    out.name = case_.name;
    out.shape = std::string("32/8 heads of 128, ") + (prompt_ ? "causal" : "page 64") + (case_.fp8 ? ", keys and values in e4m3" : "");
    out.correct = check(out.checks);
    const Timing ours = time_graph([&](cudaStream_t stream) {
      for (int copy = 0; copy < copies_; ++copy) enqueue(copy, stream);
    });
    out.seconds = ours.seconds / copies_;
    out.spread = ours.spread;
    if (!prompt_) {  // a prompt is bound by arithmetic
      std::vector<const void*> regions;
      for (int copy = 0; copy < copies_; ++copy) regions.push_back(pools_.at(2 * pool_bytes_ * copy));
      out.bytes = static_cast<double>(visible_);
      out.floor = time_reads(regions, visible_).seconds;
    }
    report.add(out);
  }

 private:
  Buffer random_pools(size_t elements) const {
    Buffer wide = random_buffer(DType::kBF16, elements * 2 * copies_, 20);
    if (!case_.fp8) return wide;
    Buffer narrow(elements * 2 * copies_);
    for (int i = 0; i < 2 * copies_; ++i)
      convert_kernel<<<static_cast<unsigned>((elements + 255) / 256), 256>>>(wide.as<bf16>() + elements * i, reinterpret_cast<e4m3*>(narrow.at(elements * i)),
                                                                            static_cast<int64_t>(elements), i % 2 ? kValueScale : kKeyScale);
    SPECRT_CHECK_LAUNCH();
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    return narrow;
  }

  AttentionParams params(int copy) const {
    AttentionParams p{};
    p.dtype = p.kv_dtype = DType::kBF16;
    if (case_.fp8) p.kv_dtype = DType::kE4M3, p.k_scale = kKeyScale, p.v_scale = kValueScale;
    p.q = q_.as();
    p.k_pool = pools_.at(2 * pool_bytes_ * copy);
    p.v_pool = pools_.at(2 * pool_bytes_ * copy + pool_bytes_);
    p.block_table = table_.as<int32_t>();
    p.row_request = request_.as<int32_t>();
    p.row_prefix = prefix_.as<int32_t>();
    p.ancestors = prompt_ ? nullptr : words_.as<int64_t>();
    p.scale = 0.08838834764831845f;  // 128^-1/2
    p.num_rows = counts_.as<int32_t>();
    p.plan = plan_.as<int32_t>();
    p.workspace = prompt_ ? nullptr : workspace_.as<float>();
    p.out = out_.as();
    p.rows = rows_;
    p.requests = case_.batch;
    p.pages = case_.batch * max_pages_;
    p.q_heads = kHeads;
    p.kv_heads = kKvHeads;
    p.head_dim = kDim;
    p.page = kPage;
    p.max_pages = max_pages_;
    return p;
  }

  void enqueue(int copy, cudaStream_t stream) const {
    if (prompt_) launch_prefill_attention_cuda(params(copy), stream);
    else launch_tree_attention_cuda(params(copy), stream);
  }

  // As a forward pass does once for all layers.
  static void plan(const AttentionParams& p) {
    launch_attention_plan_cuda({p.row_request, p.row_prefix, p.ancestors, nullptr, p.num_rows, const_cast<int32_t*>(p.plan), p.rows, p.requests, p.q_heads, p.kv_heads,
                                p.max_pages * p.page, 0, p.kv_dtype == DType::kE4M3},
                               nullptr);
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
  }

  bool check(std::string& said) const {
    const int copy = copies_ - 1, last = rows_ - 1;
    const size_t row_bytes = alone_.bytes();
    poison(out_.as(), out_.bytes());
    poison(alone_.as(), row_bytes);
    poison(workspace_.as(), workspace_.bytes());
    if (!prompt_) plan(params(copy));
    enqueue(copy, nullptr);
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    const size_t bad = count_not_finite(out_.as(), DType::kBF16, out_.bytes() / 2);

    AttentionParams p = params(copy);
    p.q = q_.at(row_bytes * last);
    p.row_request = request_.as<int32_t>() + last;
    p.row_prefix = prefix_.as<int32_t>() + last;
    p.ancestors = prompt_ ? nullptr : words_.as<int64_t>() + last;
    p.num_rows = counts_.as<int32_t>() + 1;
    p.workspace = workspace_.as<float>();
    p.out = alone_.as();
    p.rows = 1;
    p.requests = 1;
    plan(p);
    launch_tree_attention_cuda(p, nullptr);
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    if (!prompt_) plan(params(copy));
    const bool same = download<char>(out_.at(row_bytes * last), row_bytes) == download<char>(alone_.as(), row_bytes);

    constexpr int kSamples = 48;
    const int most = case_.context + 64;
    std::vector<int2> samples;  // scattered, and the last head of the last row
    for (int i = 0; i < kSamples; ++i) samples.push_back(i ? make_int2(static_cast<int>(i * 7919LL % rows_), i * 13 % kHeads) : make_int2(last, kHeads - 1));
    const Buffer list = upload(samples), scores(sizeof(double) * kSamples * most), got(sizeof(double) * kSamples * kDim), reference(sizeof(double) * kSamples * kDim);
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    reference_kernel<<<kSamples, kDim>>>(params(copy), list.as<int2>(), most, scores.as<double>(), got.as<double>(), reference.as<double>());
    SPECRT_CHECK_LAUNCH();
    const double error = worst_relative_error(download<double>(got.as(), kSamples * kDim), download<double>(reference.as(), kSamples * kDim), kDim);
    char text[160];
    std::snprintf(text, sizeof text, "error %.1e, bits: %s", error, same ? "same" : "DIFFER from the last row alone");
    said = text;
    if (bad) said += ", " + std::to_string(bad) + " outputs NOT FINITE";
    if (!(error <= kTolerance)) said += ", WRONG";
    return same && !bad && error <= kTolerance;
  }

  Case case_;
  bool prompt_;
  int rows_, max_pages_ = 0, copies_ = 0;
  size_t visible_ = 0, pool_bytes_ = 0;
  Buffer pools_;  // [copies, 2 (K, V), pages, kv heads, page, dim]
  Buffer q_, out_, alone_, table_, request_, prefix_, words_, counts_, plan_, workspace_;
};

bool measure_all(int argc, char** argv) {
  std::vector<std::string> names;
  for (const Case& row : kCases) names.push_back(row.name);
  const Arguments arguments(argc, argv, "bench_attention: decode, tree verification and prefill attention over paged KV, us a layer, cold.", names);
  if (arguments.answered()) return true;
  const std::string card = card_name();
  Report report(arguments.value("--json", ""), card, measure_read_bandwidth());
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) Bench(row).measure(report);
  return report.all_correct();
}

}  // namespace
}  // namespace specrt::bench

int main(int argc, char** argv) {
  return specrt::bench::run("bench_attention", [&] { return specrt::bench::measure_all(argc, argv); });
}

// Linear layers: a whole model's, one graph over distinct weights (so that each is read from memory), and each of its shapes alone.
//
// floor: the weights' bytes over the read bandwidth measured in the run. Every timed configuration is first compared with a float64 reference, and its row 0 with
// the same row computed alone: `==` on the bits, the project's promise.
#include <cmath>
#include <cstdio>
#include <map>

#include "common/arguments.h"
#include "common/cublas.h"
#include "common/read.h"
#include "common/report.h"
#include "gemm/params.h"

namespace specrt::bench {
namespace {

struct Shape {
  std::string label;
  int N, K, count;       // distinct weights of this shape
  DType out_dtype = DType::kBF16;
};
struct Model {
  std::string title, prefix;  // prefix: of the rows' names, "" for the default
  std::vector<Shape> shapes;  // the whole model; a layer is one of each, lm_head apart
};

Model dense(std::string title, std::string prefix, int layers, int hidden, int qkv, int inter, int vocab) {
  return {title, prefix, {{"qkv", qkv, hidden, layers}, {"o", hidden, hidden, layers}, {"gate_up", 2 * inter, hidden, layers}, {"down", hidden, inter, layers},
                          {"lm_head", vocab, hidden, 1, DType::kF32}}};
}

Model model_of(const std::string& name) {
  if (name == "llama-8b") return dense("Llama-3.1-8B", "", 32, 4096, 6144, 14336, 128256);
  if (name == "llama-1b") return dense("Llama-3.2-1B", "llama1b_", 16, 2048, 3072, 8192, 128256);
  if (name == "smollm2") return dense("SmolLM2-135M", "smollm2_", 30, 576, 960, 1536, 49152);
  int N = 0, K = 0, end = 0;
  if (std::sscanf(name.c_str(), "%dx%d%n", &N, &K, &end) != 2 || end != static_cast<int>(name.size()) || N <= 0 || K <= 0 || K % 8 || N > (1 << 20) || K > (1 << 20))
    fail("--shape: llama-8b, llama-1b, smollm2, or NxK with K a multiple of 8; got '" + name + "'");
  return {name, name + "_", {{"weight", N, K, cold_copies(static_cast<size_t>(N) * K * 2)}}};
}

struct Linear {
  Shape shape;
  Buffer weights;    // [count, N, K]
  Buffer packed;     // [count] as launch_linear_cuda reads them
  Buffer out, alone; // [most rows, N]; [1, N]

  size_t weight_bytes() const { return static_cast<size_t>(shape.N) * shape.K * 2; }
  size_t packed_bytes() const { return static_cast<size_t>((shape.N + 63) / 64) * ((shape.K + 63) / 64) * 64 * 64 * 2; }
  size_t row_bytes() const { return shape.N * bytes_of(shape.out_dtype); }
};

// One row of the evidence: so many tokens, through the whole model or through one layer of it.
struct Case {
  std::string name;
  int tokens;
  bool one_layer;
};
const Case kCases[] = {{"linear_bf16_m1", 1, false},   {"linear_bf16_m8", 8, false},     {"linear_bf16_m32", 32, false},          {"linear_bf16_m64", 64, false},
                       {"linear_bf16_m128", 128, false}, {"linear_bf16_m160", 160, false}, {"linear_bf16_m256", 256, false}, {"prefill_linear_bf16_m4096", 4096, true}};

constexpr int kSamples = 64, kLength = 64;  // vectors of outputs compared with the reference, and their length
constexpr double kTolerance[] = {1e-3, 5e-3};  // of their relative error, for fp32 and bf16 outputs (whose rounding alone costs up to 2^-9 an element)

struct Sample {
  int row, first;  // outputs first .. first + kLength - 1
};

// A warp an output, float64.
__global__ void reference_kernel(const bf16* x, const bf16* weight, const void* out, bool out_f32, int N, int K, const Sample* samples, double* got, double* reference) {
  const Sample sample = samples[blockIdx.x];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int i = warp; i < kLength; i += warps) {
    const int output = min(sample.first + i, N - 1);
    double sum = 0;
    for (int k = lane; k < K; k += 32)
      sum += static_cast<double>(to_float(x[static_cast<int64_t>(sample.row) * K + k])) * static_cast<double>(to_float(weight[static_cast<int64_t>(output) * K + k]));
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const int64_t at = static_cast<int64_t>(sample.row) * N + output;
    if (lane == 0) {
      reference[blockIdx.x * kLength + i] = sum;
      got[blockIdx.x * kLength + i] = out_f32 ? static_cast<const float*>(out)[at] : to_float(static_cast<const bf16*>(out)[at]);
    }
  }
}

class Bench {
 public:
  Bench(const Model& model, int most_tokens, int head_tokens, std::unique_ptr<Cublas> cublas, bool breakdown)
      : model_(model), cublas_(std::move(cublas)), breakdown_(breakdown) {
    uint32_t seed = 10;
    for (const Shape& shape : model.shapes) {
      Linear linear{shape, {}, {}, {}};
      const size_t elements = static_cast<size_t>(shape.N) * shape.K;
      linear.weights = Buffer(elements * 2 * shape.count);
      const float scale = 1.0f / std::sqrt(static_cast<float>(shape.K));
      fill_random(linear.weights.as(), DType::kBF16, elements * shape.count, seed++, scale);
      linear.packed = Buffer(linear.packed_bytes() * shape.count);
      for (int i = 0; i < shape.count; ++i)
        launch_pack_linear_cuda({DType::kBF16, linear.weights.at(linear.weight_bytes() * i), linear.packed.at(linear.packed_bytes() * i), shape.N, shape.K}, nullptr);
      linear.out = Buffer(linear.row_bytes() * (is_head(shape) ? head_tokens : most_tokens));
      linear.alone = Buffer(linear.row_bytes());
      linears_.push_back(std::move(linear));
      if (!inputs_.count(shape.K)) inputs_[shape.K] = random_buffer(DType::kBF16, static_cast<size_t>(most_tokens) * shape.K, seed++);
    }
  }

  void measure(const Case& row, double bandwidth, Report& report) {
    const Buffer tokens = upload<int32_t>({row.tokens, 1});
    std::vector<Linear*> parts;
    for (Linear& linear : linears_)
      if (!row.one_layer || !is_head(linear.shape)) parts.push_back(&linear);
    size_t bytes = 0;
    bool correct = true;
    for (Linear* linear : parts) {
      const int count = row.one_layer ? 1 : linear->shape.count;
      bytes += linear->weight_bytes() * count;
      std::string checks;
      const bool fine = check(*linear, row.tokens, tokens, checks);
      correct = correct && fine;
      add(report, row, "/" + linear->shape.label, std::to_string(linear->shape.N) + " x " + std::to_string(linear->shape.K), {linear}, linear->shape.count, tokens,
          bandwidth, linear->weight_bytes(), fine, checks);
    }
    const std::string what = row.one_layer ? ", one layer" : model_.shapes.size() == 1 ? ", " + std::to_string(model_.shapes[0].count) + " weights" : ", all layers + lm_head";
    add(report, row, "", model_.title + what, parts, 1, tokens, bandwidth, bytes, correct, correct ? "all of the above hold" : "WRONG: see above");
  }

 private:
  static bool is_head(const Shape& shape) { return shape.label == "lm_head"; }

  void enqueue(const Linear& linear, int index, int tokens, const int32_t* num_rows, void* out, cudaStream_t stream) const {
    LinearParams p{};
    p.dtype = DType::kBF16;
    p.out_dtype = linear.shape.out_dtype;
    p.x = inputs_.at(linear.shape.K).as();
    p.weight = linear.packed.at(linear.packed_bytes() * index);
    p.out = out;
    p.num_rows = num_rows;
    p.rows = tokens;
    p.out_features = linear.shape.N;
    p.in_features = linear.shape.K;
    launch_linear_cuda(p, stream);
  }

  // `run(linear, index)` for all weights of `parts`, layer by layer.
  template <typename Run> static void in_order(const std::vector<Linear*>& parts, bool one_layer, Run&& run) {
    int layers = 1;
    for (const Linear* linear : parts) layers = std::max(layers, one_layer ? 1 : linear->shape.count);
    for (int layer = 0; layer < layers; ++layer)
      for (const Linear* linear : parts) {
        const bool last_only = is_head(linear->shape) && parts.size() > 1;
        if (last_only ? layer == layers - 1 : layer < linear->shape.count) run(*linear, last_only ? 0 : layer);
      }
  }

  // Times `parts`; the row is that time divided by `calls`.
  void add(Report& report, const Case& row, const std::string& suffix, const std::string& shape, const std::vector<Linear*>& parts, int calls, const Buffer& tokens,
           double bandwidth, size_t bytes, bool correct, const std::string& checks) const {
    const bool one_layer = row.one_layer && suffix.empty();
    const Timing ours = time_graph([&](cudaStream_t stream) {
      in_order(parts, one_layer, [&](const Linear& linear, int index) { enqueue(linear, index, row.tokens, tokens.as<int32_t>(), linear.out.as(), stream); });
    });
    Row out;
    out.name = model_.prefix + row.name + suffix;
    out.shape = shape;
    out.unit = suffix.empty() ? "ms" : "us";
    out.seconds = ours.seconds / calls;
    out.spread = ours.spread;
    out.bytes = static_cast<double>(bytes);
    if (!row.one_layer) out.floor = static_cast<double>(bytes) / bandwidth;  // a prompt is bound by arithmetic
    if (cublas_) {
      const Timing peer = time_graph([&](cudaStream_t stream) {
        in_order(parts, one_layer, [&](const Linear& linear, int index) {
          cublas_->linear(stream, inputs_.at(linear.shape.K).as(), linear.weights.at(linear.weight_bytes() * index), linear.out.as(), linear.shape.out_dtype, row.tokens,
                          linear.shape.N, linear.shape.K);
        });
      });
      out.peer = "cuBLAS";
      out.peer_seconds = peer.seconds / calls;
    }
    out.correct = correct;
    out.checks = checks;
    out.evidence = suffix.empty() || breakdown_;
    report.add(out);
  }

  // The last weight of this shape: into poisoned memory, all finite, samples against the reference, row 0 against itself alone; cuBLAS likewise.
  bool check(const Linear& linear, int tokens, const Buffer& num_rows, std::string& said) const {
    const Shape& shape = linear.shape;
    const int index = shape.count - 1;
    poison(linear.out.as(), linear.row_bytes() * tokens);
    poison(linear.alone.as(), linear.row_bytes());
    enqueue(linear, index, tokens, num_rows.as<int32_t>(), linear.out.as(), nullptr);
    enqueue(linear, index, 1, num_rows.as<int32_t>() + 1, linear.alone.as(), nullptr);
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    const bool same = download<char>(linear.out.as(), linear.row_bytes()) == download<char>(linear.alone.as(), linear.row_bytes());
    const double tolerance = kTolerance[shape.out_dtype == DType::kBF16];
    const size_t bad = count_not_finite(linear.out.as(), shape.out_dtype, static_cast<size_t>(tokens) * shape.N);
    const double error = error_of(linear, index, tokens);
    char text[160];
    std::snprintf(text, sizeof text, "error %.1e, bits: %s", error, same ? "same" : "DIFFER from row 0 alone");
    said = text;
    if (bad) said += ", " + std::to_string(bad) + " outputs NOT FINITE";
    if (!(error <= tolerance)) said += ", WRONG";
    if (cublas_) {
      poison(linear.out.as(), linear.row_bytes() * tokens);
      cublas_->linear(nullptr, inputs_.at(shape.K).as(), linear.weights.at(linear.weight_bytes() * index), linear.out.as(), shape.out_dtype, tokens, shape.N, shape.K);
      if (!(error_of(linear, index, tokens) <= tolerance)) fail("cuBLAS' result is wrong: its time would mean nothing");
    }
    return same && !bad && error <= tolerance;
  }

  double error_of(const Linear& linear, int index, int tokens) const {
    const Shape& shape = linear.shape;
    std::vector<Sample> samples(kSamples);
    for (int i = 0; i < kSamples; ++i)  // scattered, and the last outputs of the last row
      samples[i] = i ? Sample{static_cast<int>(i * 7919LL % tokens), static_cast<int>(i * 104729LL % std::max(1, shape.N - kLength))} : Sample{tokens - 1, std::max(0, shape.N - kLength)};
    const Buffer list = upload(samples), got(kSamples * kLength * sizeof(double)), reference(kSamples * kLength * sizeof(double));
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    reference_kernel<<<kSamples, 256>>>(inputs_.at(shape.K).as<bf16>(), reinterpret_cast<const bf16*>(linear.weights.at(linear.weight_bytes() * index)), linear.out.as(),
                                        shape.out_dtype == DType::kF32, shape.N, shape.K, list.as<Sample>(), got.as<double>(), reference.as<double>());
    SPECRT_CHECK_LAUNCH();
    return worst_relative_error(download<double>(got.as(), kSamples * kLength), download<double>(reference.as(), kSamples * kLength), kLength);
  }

  Model model_;
  std::unique_ptr<Cublas> cublas_;
  std::vector<Linear> linears_;
  std::map<int, Buffer> inputs_;  // by K: [most rows, K]
  bool breakdown_;                // the single shapes go to the JSON file too
};

bool measure_all(int argc, char** argv) {
  std::vector<std::string> names;
  for (const Case& row : kCases) names.push_back(row.name);
  const Arguments arguments(argc, argv,
                            "bench_linear: the linear layers of a model, bf16 weights, cold; beside cuBLAS.\n\n"
                            "  --shape S    llama-8b (default), llama-1b, smollm2, or NxK: one weight matrix [N, K]\n"
                            "  --cublas P   libcublas.so.N or its folder (else SPECRT_CUBLAS, then the loader's paths)\n"
                            "  --all        write the single shapes to the JSON file too",
                            names, {"--shape", "--cublas"}, {"--all"});
  if (arguments.answered()) return true;
  const Model model = model_of(arguments.value("--shape", "llama-8b"));
  int most = 1, head = 1;
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) {
      most = std::max(most, row.tokens);
      if (!row.one_layer) head = std::max(head, row.tokens);
    }
  const std::string card = card_name();
  std::unique_ptr<Cublas> cublas = Cublas::open(arguments.value("--cublas", ""));
  std::printf(cublas ? "cuBLAS %s\n" : "no cuBLAS was found%s: no peer (--cublas PATH)\n", cublas ? cublas->version().c_str() : "");
  const double bandwidth = measure_read_bandwidth();
  Bench bench(model, most, head, std::move(cublas), arguments.has("--all"));
  Report report(arguments.value("--json", ""), card, bandwidth);
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) bench.measure(row, bandwidth, report);
  return report.all_correct();
}

}  // namespace
}  // namespace specrt::bench

int main(int argc, char** argv) {
  return specrt::bench::run("bench_linear", [&] { return specrt::bench::measure_all(argc, argv); });
}

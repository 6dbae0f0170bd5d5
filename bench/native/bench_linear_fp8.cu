// FP8 linear layers of Llama-3.1-8B, lm_head in FP8 too: one graph over distinct weights (so that each is read from memory), and each shape alone.
//
// floor: the weights' bytes as stored over the read bandwidth measured in the run. The activations come quantised; "linear_fp8_quantize" rows
// have their quantisation from bfloat16, a kernel of its own before every layer, too. Every timed configuration is first compared with a float64 reference of the quantised product, and its row 0 with the
// same row computed alone: `==` on the bits.
#include <cmath>
#include <cstdio>
#include <map>

#include "common/arguments.h"
#include "common/read.h"
#include "common/report.h"
#include "gemm/params.h"

namespace specrt::bench {
namespace {

struct Shape {
  std::string label;
  int N, K, count;  // distinct weights of this shape
  DType out_dtype = DType::kBF16;
};
const std::vector<Shape> kShapes = {{"qkv", 6144, 4096, 32}, {"o", 4096, 4096, 32}, {"gate_up", 28672, 4096, 32}, {"down", 4096, 14336, 32}, {"lm_head", 128256, 4096, 1, DType::kF32}};

// One row of the evidence: so many tokens, through the whole model or through one layer of it.
struct Case {
  std::string name;
  int tokens;
  bool one_layer = false, quantize = false;  // quantize: the activations too
};
const Case kCases[] = {{"linear_fp8_m1", 1},     {"linear_fp8_m8", 8},     {"linear_fp8_m32", 32},
                       {"linear_fp8_m64", 64},   {"linear_fp8_m128", 128}, {"linear_fp8_m256", 256},
                       {"linear_fp8_quantize_m1", 1, false, true}, {"linear_fp8_quantize_m64", 64, false, true}, {"prefill_linear_fp8_m4096", 4096, true}};

constexpr int kSamples = 64, kLength = 64;     // vectors of outputs compared with the reference, and their length
constexpr double kTolerance[] = {1e-3, 5e-3};  // of their relative error, for fp32 and bf16 outputs (whose rounding alone costs up to 2^-9 an element)

struct Sample {
  int row, first;  // outputs first .. first + kLength - 1
};

__device__ float value_of(const LinearFp8Params& p, int output, int k) {  // of the packed weight (pack.cu)
  const int64_t unit = output / 64 * static_cast<int64_t>((p.in_features + 127) / 128) + k / 128;
  const int row = output % 64, chunk = k % 128 / 16 ^ row % 8;
  return to_float(static_cast<const e4m3*>(p.weight)[unit * 8192 + row * 128 + chunk * 16 + k % 16]);
}

// A warp an output, float64. weight_blocks == 1.
__global__ void reference_kernel(LinearFp8Params p, const Sample* samples, double* got, double* reference) {
  const Sample sample = samples[blockIdx.x];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int i = warp; i < kLength; i += warps) {
    const int output = min(sample.first + i, p.out_features - 1);
    double sum = 0;
    for (int k = lane; k < p.in_features; k += 32)
      sum += static_cast<double>(to_float(p.x[static_cast<int64_t>(sample.row) * p.in_features + k])) * p.x_scale[k / kScaleBlock * scale_pitch(p.rows) + sample.row] * value_of(p, output, k);
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const int64_t at = static_cast<int64_t>(sample.row) * p.out_features + output;
    if (lane == 0) {
      reference[blockIdx.x * kLength + i] = sum * p.weight_scale[output];
      got[blockIdx.x * kLength + i] = p.out_dtype == DType::kF32 ? static_cast<const float*>(p.out)[at] : to_float(static_cast<const bf16*>(p.out)[at]);
    }
  }
}

// Gaussian e4m3 values: of bfloat16 ones.
__global__ void convert_kernel(const bf16* from, e4m3* to, int64_t count) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < count) to[i] = to_e4m3(to_float(from[i]));
}
__global__ void convert_scales_kernel(const bf16* from, float* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = (1.0f + fabsf(to_float(from[i]))) * 1e-3f;
}

struct Linear {
  Shape shape;
  Buffer weights, scales;  // [count, N, K] packed; [N]
  Buffer out, alone;       // [most rows, N]; [1, N]

  size_t weight_bytes() const { return static_cast<size_t>(shape.N) * shape.K; }  // N % 64 == 0, K % 128 == 0: nothing is padded
  size_t row_bytes() const { return shape.N * bytes_of(shape.out_dtype); }
};
struct Input {
  Buffer x, q, scale;  // [most rows, K] bfloat16 and e4m3; [K / 128, pitch]
};

class Bench {
 public:
  Bench(int most_tokens, int head_tokens) {
    uint32_t seed = 10;
    for (const Shape& shape : kShapes) {
      Linear linear{shape, {}, {}, {}, {}};
      const size_t elements = static_cast<size_t>(shape.N) * shape.K;
      linear.weights = Buffer(elements * shape.count);
      for (int i = 0; i < shape.count; ++i) {  // random values are as random packed
        const Buffer wide = random_buffer(DType::kBF16, elements, seed++, 100.0f);
        convert_kernel<<<static_cast<unsigned>((elements + 255) / 256), 256>>>(wide.as<bf16>(), reinterpret_cast<e4m3*>(linear.weights.at(elements * i)), elements);
        SPECRT_CHECK_LAUNCH();
        SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
      }
      const Buffer wide = random_buffer(DType::kBF16, shape.N, seed++);
      linear.scales = Buffer(shape.N * sizeof(float));
      convert_scales_kernel<<<(shape.N + 255) / 256, 256>>>(wide.as<bf16>(), linear.scales.as<float>(), shape.N);
      SPECRT_CHECK_LAUNCH();
      SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
      linear.out = Buffer(linear.row_bytes() * (is_head(shape) ? head_tokens : most_tokens));
      linear.alone = Buffer(linear.row_bytes());
      linears_.push_back(std::move(linear));
      if (!inputs_.count(shape.K)) {
        Input& input = inputs_[shape.K];
        input.x = random_buffer(DType::kBF16, static_cast<size_t>(most_tokens) * shape.K, seed++);
        input.q = Buffer(static_cast<size_t>(most_tokens) * shape.K);
        input.scale = Buffer(sizeof(float) * scale_pitch(most_tokens) * (shape.K / kScaleBlock));
      }
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
      bytes += linear->weight_bytes() * (row.one_layer ? 1 : linear->shape.count);
      std::string checks;
      const bool fine = check(*linear, row.tokens, tokens, checks);
      correct = correct && fine;
      add(report, row, "/" + linear->shape.label, std::to_string(linear->shape.N) + " x " + std::to_string(linear->shape.K), {linear}, linear->shape.count, tokens,
          bandwidth, linear->weight_bytes(), fine, checks);
    }
    add(report, row, "", std::string("Llama-3.1-8B") + (row.one_layer ? ", one layer" : ", all layers + lm_head in FP8"), parts, 1, tokens, bandwidth, bytes, correct,
        correct ? "all of the above hold" : "WRONG: see above");
  }

 private:
  static bool is_head(const Shape& shape) { return shape.label == "lm_head"; }

  LinearFp8Params params(const Linear& linear, int index, int tokens, const int32_t* num_rows, void* out) const {
    const Input& input = inputs_.at(linear.shape.K);
    return {linear.shape.out_dtype, input.q.as<e4m3>(), input.scale.as<float>(), linear.weights.at(linear.weight_bytes() * index), linear.scales.as<float>(), 1, nullptr, out,
            num_rows, tokens, linear.shape.N, linear.shape.K};
  }
  void quantize(int K, int tokens, const int32_t* num_rows, cudaStream_t stream) const {
    const Input& input = inputs_.at(K);
    launch_quantize_fp8_cuda({DType::kBF16, input.x.as(), input.q.as<e4m3>(), input.scale.as<float>(), num_rows, tokens, K}, stream);
  }

  // `run(linear, index)` for all weights of `parts`, layer by layer, lm_head last.
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
    const Timing ours = time_graph([&](cudaStream_t stream) {
      in_order(parts, row.one_layer && calls == 1, [&](const Linear& linear, int index) {
        if (row.quantize) quantize(linear.shape.K, row.tokens, tokens.as<int32_t>(), stream);
        launch_linear_fp8_cuda(params(linear, index, row.tokens, tokens.as<int32_t>(), linear.out.as()), stream);
      });
    });
    Row out;
    out.name = row.name + suffix;
    out.shape = shape;
    out.unit = calls == 1 && parts.size() > 1 ? "ms" : "us";
    out.seconds = ours.seconds / calls;
    out.spread = ours.spread;
    out.bytes = static_cast<double>(bytes);
    if (!row.one_layer) out.floor = static_cast<double>(bytes) / bandwidth;  // a prompt is bound by arithmetic
    out.correct = correct;
    out.checks = checks;
    out.evidence = suffix.empty();
    report.add(out);
  }

  // The last weight of this shape: into poisoned memory, all finite, samples against the reference, row 0 against itself alone.
  bool check(const Linear& linear, int tokens, const Buffer& num_rows, std::string& said) const {
    const Shape& shape = linear.shape;
    poison(linear.out.as(), linear.row_bytes() * tokens);
    poison(linear.alone.as(), linear.row_bytes());
    quantize(shape.K, 1, num_rows.as<int32_t>() + 1, nullptr);
    launch_linear_fp8_cuda(params(linear, shape.count - 1, 1, num_rows.as<int32_t>() + 1, linear.alone.as()), nullptr);
    quantize(shape.K, tokens, num_rows.as<int32_t>(), nullptr);
    const LinearFp8Params p = params(linear, shape.count - 1, tokens, num_rows.as<int32_t>(), linear.out.as());
    launch_linear_fp8_cuda(p, nullptr);
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    const bool same = download<char>(linear.out.as(), linear.row_bytes()) == download<char>(linear.alone.as(), linear.row_bytes());
    const size_t bad = count_not_finite(linear.out.as(), shape.out_dtype, static_cast<size_t>(tokens) * shape.N);
    const double error = error_of(p);
    char text[160];
    std::snprintf(text, sizeof text, "error %.1e, bits: %s", error, same ? "same" : "DIFFER from row 0 alone");
    said = text;
    if (bad) said += ", " + std::to_string(bad) + " outputs NOT FINITE";
    const bool close = error <= kTolerance[shape.out_dtype == DType::kBF16];
    if (!close) said += ", WRONG";
    return same && !bad && close;
  }

  static double error_of(const LinearFp8Params& p) {
    std::vector<Sample> samples(kSamples);
    for (int i = 0; i < kSamples; ++i)  // scattered, and the last outputs of the last row
      samples[i] = i ? Sample{static_cast<int>(i * 7919LL % p.rows), static_cast<int>(i * 104729LL % (p.out_features - kLength))} : Sample{p.rows - 1, p.out_features - kLength};
    const Buffer list = upload(samples), got(kSamples * kLength * sizeof(double)), reference(kSamples * kLength * sizeof(double));
    reference_kernel<<<kSamples, 256>>>(p, list.as<Sample>(), got.as<double>(), reference.as<double>());
    SPECRT_CHECK_LAUNCH();
    return worst_relative_error(download<double>(got.as(), kSamples * kLength), download<double>(reference.as(), kSamples * kLength), kLength);
  }

  std::vector<Linear> linears_;
  std::map<int, Input> inputs_;  // by K
};

bool measure_all(int argc, char** argv) {
  std::vector<std::string> names;
  for (const Case& row : kCases) names.push_back(row.name);
  const Arguments arguments(argc, argv, "bench_linear_fp8: the linear layers of Llama-3.1-8B, FP8 weights (lm_head too), cold.", names);
  if (arguments.answered()) return true;
  int most = 1, head = 1;
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) {
      most = std::max(most, row.tokens);
      if (!row.one_layer) head = std::max(head, row.tokens);
    }
  const std::string card = card_name();
  const double bandwidth = measure_read_bandwidth();
  Bench bench(most, head);
  Report report(arguments.value("--json", ""), card, bandwidth);
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) bench.measure(row, bandwidth, report);
  return report.all_correct();
}

}  // namespace
}  // namespace specrt::bench

int main(int argc, char** argv) {
  return specrt::bench::run("bench_linear_fp8", [&] { return specrt::bench::measure_all(argc, argv); });
}

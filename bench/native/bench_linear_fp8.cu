// Linear layers of Llama-3.1-8B with FP8 weights and lm_head in bfloat16, as quantization="fp8" loads it: one graph over distinct weights (so that each is read from memory), and each shape alone.
//
// floor: the weights' bytes as stored over the read bandwidth measured in the run. Up to kSelfQuantizedRows tokens come in bfloat16 and linear_fp8 quantises them; more come quantised.
// "linear_fp8_quantize" rows have the quantisation as a kernel of its own before every layer. Every timed configuration is first compared with a float64 reference of the quantised product,
// its row 0 with the same row computed alone, and what quantises itself with what two kernels make: `==` on the bits.
#include <algorithm>
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
  bool fp8 = true;  // weights and x; else both bfloat16, and out float32

  size_t weight_bytes() const { return static_cast<size_t>(N) * K * (fp8 ? 1 : 2); }  // N % 64 == 0, K % 128 == 0: packing pads nothing
  DType out_dtype() const { return fp8 ? DType::kBF16 : DType::kF32; }
};
const std::vector<Shape> kShapes = {{"qkv", 6144, 4096, 32}, {"o", 4096, 4096, 32}, {"gate_up", 28672, 4096, 32}, {"down", 4096, 14336, 32}, {"lm_head", 128256, 4096, 1, false}};

// One row of the evidence: so many tokens, through the whole model or through one layer of it.
struct Case {
  std::string name;
  int tokens;
  bool one_layer = false, quantize = false;  // quantize: by a kernel of its own
};
enum class From { kQuantized, kBf16 };  // what linear_fp8 takes
From way_of(const Case& row) { return !row.quantize && row.tokens <= kSelfQuantizedRows ? From::kBf16 : From::kQuantized; }

const Case kCases[] = {{"linear_fp8_m1", 1},
                       {"linear_fp8_m8", 8},
                       {"linear_fp8_m16", 16},
                       {"linear_fp8_m32", 32},
                       {"linear_fp8_m64", 64},
                       {"linear_fp8_m128", 128},
                       {"linear_fp8_m160", 160},
                       {"linear_fp8_m256", 256},
                       {"linear_fp8_quantize_m1", 1, false, true},
                       {"linear_fp8_quantize_m8", 8, false, true},
                       {"linear_fp8_quantize_m16", 16, false, true},
                       {"linear_fp8_quantize_m32", 32, false, true},
                       {"linear_fp8_quantize_m64", 64, false, true},
                       {"prefill_linear_fp8_m4096", 4096, true}};

constexpr int kSamples = 64, kLength = 64;     // vectors of outputs compared with the reference, and their length
constexpr double kTolerance[] = {1e-3, 5e-3};  // of their relative error, for fp32 and bf16 outputs (whose rounding alone costs up to 2^-9 an element)

struct Sample {
  int row, first;  // outputs first .. first + kLength - 1
};

struct Product {  // x [rows, K] bfloat16, or e4m3 with its scales; weight packed (pack.cu); out float32, or bfloat16 where there are scales
  const void *x, *weight, *out;
  const float *x_scale, *weight_scale;
  int rows, N, K;
};

template <typename T> __device__ double value_of(const Product& p, int output, int k) {
  constexpr int chunk = 16 / sizeof(T), columns = 8 * chunk;
  const int64_t unit = output / 64 * static_cast<int64_t>(p.K / columns) + k / columns;
  const int row = output % 64, place = k % columns / chunk ^ row % 8;
  return to_float(static_cast<const T*>(p.weight)[(unit * 64 + row) * columns + place * chunk + k % chunk]);
}

// A warp an output, float64.
__global__ void reference_kernel(Product p, const Sample* samples, double* got, double* reference) {
  const Sample sample = samples[blockIdx.x];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int i = warp; i < kLength; i += warps) {
    const int output = sample.first + i;
    double sum = 0;
    for (int k = lane; k < p.K; k += 32) {
      const int64_t at = static_cast<int64_t>(sample.row) * p.K + k;
      sum += p.x_scale ? static_cast<double>(to_float(static_cast<const e4m3*>(p.x)[at])) * p.x_scale[k / kScaleBlock * scale_pitch(p.rows) + sample.row] * value_of<e4m3>(p, output, k)
                       : to_float(static_cast<const bf16*>(p.x)[at]) * value_of<bf16>(p, output, k);
    }
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const int64_t at = static_cast<int64_t>(sample.row) * p.N + output;
    if (lane == 0) {
      reference[blockIdx.x * kLength + i] = p.x_scale ? sum * p.weight_scale[output] : sum;
      got[blockIdx.x * kLength + i] = p.x_scale ? to_float(static_cast<const bf16*>(p.out)[at]) : static_cast<const float*>(p.out)[at];
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
  Buffer out;              // [most rows, N]

  size_t row_bytes() const { return shape.N * bytes_of(shape.out_dtype()); }
};
struct Input {
  Buffer x, q, scale;  // [most rows, K] bfloat16 and e4m3; [K / 128, pitch]
};

class Bench {
 public:
  Bench(int most_tokens, int head_tokens) {
    uint32_t seed = 10;
    for (const Shape& shape : kShapes) {
      Linear linear{shape, {}, {}, {}};
      const size_t elements = static_cast<size_t>(shape.N) * shape.K;
      linear.weights = Buffer(shape.weight_bytes() * shape.count);  // random values are as random packed
      if (!shape.fp8) fill_random(linear.weights.as(), DType::kBF16, elements * shape.count, seed++, 1.0f / std::sqrt(static_cast<float>(shape.K)));
      for (int i = 0; i < shape.count && shape.fp8; ++i) {
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
      bytes += linear->shape.weight_bytes() * (row.one_layer ? 1 : linear->shape.count);
      std::string checks;
      const bool fine = check(*linear, row, tokens, checks);
      correct = correct && fine;
      add(report, row, "/" + linear->shape.label, std::to_string(linear->shape.N) + " x " + std::to_string(linear->shape.K), {linear}, linear->shape.count, tokens,
          bandwidth, linear->shape.weight_bytes(), fine, checks);
    }
    add(report, row, "", std::string("Llama-3.1-8B") + (row.one_layer ? ", one layer" : ", all layers in FP8 + lm_head in bf16"), parts, 1, tokens, bandwidth, bytes, correct,
        correct ? "all of the above hold" : "WRONG: see above");
  }

 private:
  static bool is_head(const Shape& shape) { return shape.label == "lm_head"; }

  void enqueue(const Linear& linear, From from, int index, int tokens, const int32_t* num_rows, void* out, cudaStream_t stream) const {
    const Shape& shape = linear.shape;
    const Input& input = inputs_.at(shape.K);
    LinearParams p{};
    const bool quantized = shape.fp8 && from == From::kQuantized;
    p.dtype = quantized ? DType::kE4M3 : DType::kBF16;
    p.out_dtype = shape.out_dtype();
    p.x = quantized ? input.q.as() : input.x.as();
    p.weight = linear.weights.at(shape.weight_bytes() * index);
    p.out = out;
    p.num_rows = num_rows;
    p.rows = tokens;
    p.out_features = shape.N;
    p.in_features = shape.K;
    if (shape.fp8) launch_linear_fp8_cuda({p, quantized ? input.scale.as<float>() : nullptr, linear.scales.as<float>(), 1}, stream);
    else launch_linear_cuda(p, stream);
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
        if (row.quantize && linear.shape.fp8) quantize(linear.shape.K, row.tokens, tokens.as<int32_t>(), stream);
        enqueue(linear, way_of(row), index, row.tokens, tokens.as<int32_t>(), linear.out.as(), stream);
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

  // The last weight of this shape: into poisoned memory, all finite, samples against the reference, row 0 against itself alone and all rows against those of two kernels.
  bool check(const Linear& linear, const Case& row, const Buffer& num_rows, std::string& said) const {
    const Shape& shape = linear.shape;
    const int tokens = row.tokens;
    auto made = [&](From from, int rows, const int32_t* used) {
      poison(linear.out.as(), linear.row_bytes() * rows);
      if (from == From::kQuantized && shape.fp8) quantize(shape.K, rows, used, nullptr);
      enqueue(linear, from, shape.count - 1, rows, used, linear.out.as(), nullptr);
      SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
      return download<char>(linear.out.as(), linear.row_bytes() * rows);
    };
    const std::vector<char> alone = made(From::kBf16, 1, num_rows.as<int32_t>() + 1), every = made(way_of(row), tokens, num_rows.as<int32_t>());
    const bool same = std::equal(alone.begin(), alone.end(), every.begin()) && made(From::kQuantized, tokens, num_rows.as<int32_t>()) == every;
    const size_t bad = count_not_finite(linear.out.as(), shape.out_dtype(), static_cast<size_t>(tokens) * shape.N);
    const double error = error_of(linear, tokens);
    char text[160];
    std::snprintf(text, sizeof text, "error %.1e, bits: %s", error, same ? "same" : "DIFFER from row 0 alone, or from those of two kernels");
    said = text;
    if (bad) said += ", " + std::to_string(bad) + " outputs NOT FINITE";
    const bool close = error <= kTolerance[shape.fp8];
    if (!close) said += ", WRONG";
    return same && !bad && close;
  }

  double error_of(const Linear& linear, int tokens) const {
    const Shape& shape = linear.shape;
    const Input& input = inputs_.at(shape.K);
    const Product p{shape.fp8 ? input.q.as() : input.x.as(), linear.weights.at(shape.weight_bytes() * (shape.count - 1)), linear.out.as(), shape.fp8 ? input.scale.as<float>() : nullptr,
                    linear.scales.as<float>(), tokens, shape.N, shape.K};
    std::vector<Sample> samples(kSamples);
    for (int i = 0; i < kSamples; ++i)  // scattered, and the last outputs of the last row
      samples[i] = i ? Sample{static_cast<int>(i * 7919LL % tokens), static_cast<int>(i * 104729LL % (shape.N - kLength))} : Sample{tokens - 1, shape.N - kLength};
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
  const Arguments arguments(argc, argv, "bench_linear_fp8: the linear layers of Llama-3.1-8B, FP8 weights (lm_head bf16), cold.", names);
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

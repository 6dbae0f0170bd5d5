// Choosing tokens from logits: sample_transform with the choice in it, on rows of a vocabulary of 128256, cold.
//
// floor: a graph-timed pure read of the logits. The transform works in place, so every replay gets fresh logits (a copy that is not timed). Checked on the host: which tokens
// the filter keeps and with which values, the choice itself, and that a row alone, and the choice where nothing is kept (a round without logprobs), have the same result.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/noise.h"
#include "common/arguments.h"
#include "common/read.h"
#include "common/report.h"
#include "sample/params.h"

namespace specrt::bench {
namespace {

constexpr int kVocab = 128256, kPosition = 1000;

struct Case {
  std::string name;
  int rows;
  float temperature, top_p;
  bool keep;  // the filtered logits are written back, as for logprobs
};
const Case kCases[] = {{"sampling_b32_v128k", 32, 0.7f, 0.9f, true}, {"sampling_b1_v128k", 1, 0.7f, 0.9f, true}, {"greedy_b32_v128k", 32, 0.0f, 1.0f, true},
                       {"sampling_token_b32_v128k", 32, 0.7f, 0.9f, false}, {"sampling_token_b1_v128k", 1, 0.7f, 0.9f, false}, {"greedy_b1_v128k", 1, 0.0f, 1.0f, false}};

class Bench {
 public:
  explicit Bench(const Case& row) : case_(row), bytes_(static_cast<size_t>(row.rows) * kVocab * 4), copies_(cold_copies(bytes_)) {
    // A spread of 3: at temperature 0.7, top-p 0.9 keeps some tens to hundreds of tokens.
    fresh_ = random_buffer(DType::kF32, bytes_ / 4 * copies_, 30, 3.0f);
    logits_ = Buffer(fresh_.bytes());
    std::vector<int32_t> request(row.rows), position(row.rows, kPosition), integers(row.rows * kSamplingI, 0);
    std::vector<float> floats(row.rows * kSamplingF, 0.0f);
    for (int r = 0; r < row.rows; ++r) {
      request[r] = r;
      seeds_host_.push_back(1234567890123LL * (r + 1));
      floats[r * kSamplingF + kTemperature] = row.temperature;
      floats[r * kSamplingF + kTopP] = row.top_p;
      floats[r * kSamplingF + kRepetition] = 1.0f;
    }
    request_ = upload(request);
    position_ = upload(position);
    floats_ = upload(floats);
    integers_ = upload(integers);
    seeds_ = upload(seeds_host_);
    stops_ = upload(std::vector<int32_t>(row.rows, -1));
    counts_ = upload<int32_t>({row.rows, 1});
    tables_ = Buffer(bytes_);  // bias, output counts and prompt mask: all zero
    SPECRT_CUDA_CHECK(cudaMemset(tables_.as(), 0, tables_.bytes()));
    token_ = Buffer(row.rows * sizeof(int32_t));
    status_ = Buffer(row.rows * sizeof(int32_t));
  }

  void measure(Report& report) const {
    Row out;
    out.name = case_.name;
    char shape[80];
    if (case_.temperature > 0) std::snprintf(shape, sizeof shape, "%d x %d, T %.1f, top-p %.1f", case_.rows, kVocab, case_.temperature, case_.top_p);
    else std::snprintf(shape, sizeof shape, "%d x %d, T 0", case_.rows, kVocab);
    out.shape = shape + std::string(case_.keep ? "" : ", nothing kept");
    out.correct = check(out.checks);
    const Timing ours = time_graph(
        [&](cudaStream_t stream) {
          for (int copy = 0; copy < copies_; ++copy) enqueue(logits_.at(bytes_ * copy), case_.rows, counts_.as<int32_t>(), case_.keep, stream);
        },
        [&](cudaStream_t stream) { SPECRT_CUDA_CHECK(cudaMemcpyAsync(logits_.as(), fresh_.as(), fresh_.bytes(), cudaMemcpyDeviceToDevice, stream)); });
    out.seconds = ours.seconds / copies_;
    out.spread = ours.spread;
    std::vector<const void*> regions;
    for (int copy = 0; copy < copies_; ++copy) regions.push_back(fresh_.at(bytes_ * copy));
    out.bytes = static_cast<double>(bytes_);
    out.floor = time_reads(regions, bytes_).seconds;
    report.add(out);
  }

 private:
  void enqueue(void* logits, int rows, const int32_t* num_rows, bool keep, cudaStream_t stream) const {
    SampleTransformParams t{};
    t.logits = static_cast<float*>(logits);
    t.row_request = request_.as<int32_t>();
    t.row_position = position_.as<int32_t>();
    t.sampling_f = floats_.as<float>();
    t.sampling_i = integers_.as<int32_t>();
    t.stop_ids = stops_.as<int32_t>();
    t.bias = tables_.as<float>();
    t.output_count = tables_.as<int32_t>();
    t.prompt_mask = tables_.as<uint8_t>();
    t.num_rows = num_rows;
    t.status = status_.as<int32_t>();
    t.rows = rows;
    t.vocab = kVocab;
    t.stops = 1;
    t.seeds = seeds_.as<int64_t>();
    t.token = token_.as<int32_t>();
    t.keep = keep;
    launch_sample_transform_cuda(t, stream);
  }

  bool check(std::string& said) const {
    SPECRT_CUDA_CHECK(cudaMemcpy(logits_.as(), fresh_.as(), bytes_, cudaMemcpyDeviceToDevice));
    poison(token_.as(), token_.bytes());
    poison(status_.as(), status_.bytes());
    enqueue(logits_.as(), case_.rows, counts_.as<int32_t>(), true, nullptr);
    const std::vector<int32_t> tokens = download<int32_t>(token_.as(), case_.rows), status = download<int32_t>(status_.as(), case_.rows);
    const std::vector<float> z = download<float>(logits_.as(), bytes_ / 4), before = download<float>(fresh_.as(), bytes_ / 4);
    bool right = true;
    size_t kept = 0;
    for (int r = 0; r < case_.rows; ++r) right = right && status[r] == kStatusOk && row_is_right(r, before.data() + r * kVocab, z.data() + r * kVocab, tokens[r], kept);

    SPECRT_CUDA_CHECK(cudaMemcpy(logits_.as(), fresh_.as(), bytes_, cudaMemcpyDeviceToDevice));
    poison(token_.as(), token_.bytes());
    enqueue(logits_.as(), 1, counts_.as<int32_t>() + 1, true, nullptr);
    bool same = download<int32_t>(token_.as(), 1)[0] == tokens[0] && download<float>(logits_.as(), kVocab) == std::vector<float>(z.begin(), z.begin() + kVocab);

    SPECRT_CUDA_CHECK(cudaMemcpy(logits_.as(), fresh_.as(), bytes_, cudaMemcpyDeviceToDevice));
    poison(token_.as(), token_.bytes());
    enqueue(logits_.as(), case_.rows, counts_.as<int32_t>(), false, nullptr);
    same = same && download<int32_t>(token_.as(), case_.rows) == tokens;
    said = std::string(right ? "filter and tokens right" : "WRONG") + ", " + std::to_string(kept / case_.rows) + " kept a row, bits: " + (same ? "same" : "DIFFER from row 0 alone");
    return right && same;
  }

  // float64: the kept tokens are the likeliest, they reach top_p and would not without the least of them; the choice is the best score.
  bool row_is_right(int r, const float* before, const float* z, int token, size_t& kept) const {
    const float t = case_.temperature;
    double top = -1e300, least = 1e300, dropped = -1e300;
    std::vector<float> x(before, before + kVocab);
    if (t > 0)
      for (float& value : x) value = value / t;
    for (int v = 0; v < kVocab; ++v) {
      top = std::max(top, static_cast<double>(x[v]));
      const bool keeps = z[v] > -INFINITY;
      if (keeps && z[v] != x[v]) return false;
      if (keeps) least = std::min(least, static_cast<double>(x[v])), ++kept;
      else dropped = std::max(dropped, static_cast<double>(x[v]));
    }
    double total = 0, inside = 0, at_least = 0;
    int best = 0;
    float best_score = -INFINITY;
    for (int v = 0; v < kVocab; ++v) {
      const double mass = std::exp(x[v] - top);
      total += mass;
      if (!(z[v] > -INFINITY)) continue;
      inside += mass;
      if (x[v] == least) at_least += mass;
      const float score = t > 0 ? z[v] + gumbel_noise(seeds_host_[r], kPosition + 1, v, kNoiseShared) : z[v];
      if (score > best_score) best_score = score, best = v;
    }
    const double need = static_cast<double>(case_.top_p) * total;
    const bool filter = case_.top_p >= 1 ? inside == total : dropped < least && inside >= need * (1 - 1e-5) && inside - at_least < need * (1 + 1e-5);
    return filter && token == best;
  }

  Case case_;
  size_t bytes_;
  int copies_;
  std::vector<int64_t> seeds_host_;
  Buffer fresh_, logits_;  // [copies, rows, vocab]
  Buffer request_, position_, floats_, integers_, seeds_, stops_, counts_, tables_, token_, status_;
};

bool measure_all(int argc, char** argv) {
  std::vector<std::string> names;
  for (const Case& row : kCases) names.push_back(row.name);
  const Arguments arguments(argc, argv, "bench_sampling: the transforms of the logits and the choice of a token, us for all rows, cold.", names);
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
  return specrt::bench::run("bench_sampling", [&] { return specrt::bench::measure_all(argc, argv); });
}

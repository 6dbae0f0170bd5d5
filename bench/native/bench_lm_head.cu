// lm_head and the choice of a token, without logits (ops.linear_sample), beside what it replaces: the logits written, then sample_transform with the choice in it.
//
// floor: the weights' bytes over the read bandwidth measured in the run. Before anything is timed, both ways are compared with `==`: tokens, and log-probabilities with
// row_logprobs of the logits; row 0 with itself alone; and a row that has a NaN says so.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "common/arguments.h"
#include "common/read.h"
#include "common/report.h"
#include "gemm/params.h"
#include "sample/params.h"

namespace specrt::bench {
namespace {

constexpr int kCalls = 6;          // of a graph; the weights of one displace those of the one before from L2
constexpr float kSpread = 3.0f;    // of the logits
constexpr int kPosition = 1000;

struct Case {
  std::string name;
  int rows;
  float temperature;
  bool logprob;
};
const Case kCases[] = {{"lm_head_greedy_m1", 1, 0.0f, false}, {"lm_head_greedy_m8", 8, 0.0f, false}, {"lm_head_greedy_m32", 32, 0.0f, false},
                       {"lm_head_greedy_m64", 64, 0.0f, false}, {"lm_head_greedy_m128", 128, 0.0f, false}, {"lm_head_greedy_m160", 160, 0.0f, false},
                       {"lm_head_greedy_m256", 256, 0.0f, false}, {"lm_head_sample_m1", 1, 0.8f, false}, {"lm_head_sample_m8", 8, 0.8f, false},
                       {"lm_head_sample_m32", 32, 0.8f, false}, {"lm_head_sample_m64", 64, 0.8f, false}, {"lm_head_sample_m128", 128, 0.8f, false},
                       {"lm_head_sample_m160", 160, 0.8f, false}, {"lm_head_sample_m256", 256, 0.8f, false}, {"lm_head_logprob_m1", 1, 0.8f, true},
                       {"lm_head_logprob_m64", 64, 0.8f, true}};

// What a way says of its rows.
struct Said {
  Buffer token, status, logprob;

  explicit Said(int rows) : token(rows * sizeof(int32_t)), status(rows * sizeof(int32_t)), logprob(rows * sizeof(float)) {
    for (const Buffer* b : {&token, &status, &logprob}) poison(b->as(), b->bytes());
  }
};

class Bench {
 public:
  Bench(int vocab, int hidden, int most_rows) : vocab_(vocab), hidden_(hidden), blocks_((vocab + kLseBlock - 1) / kLseBlock) {
    const size_t elements = static_cast<size_t>(vocab) * hidden;
    const Buffer weight = random_buffer(DType::kBF16, elements, 10, kSpread / std::sqrt(static_cast<float>(hidden)));
    packed_ = Buffer(static_cast<size_t>((vocab + 63) / 64) * ((hidden + 63) / 64) * 64 * 64 * 2);
    launch_pack_linear_cuda({DType::kBF16, weight.as(), packed_.as(), vocab, hidden}, nullptr);
    SPECRT_CUDA_CHECK(cudaDeviceSynchronize());
    x_ = random_buffer(DType::kBF16, static_cast<size_t>(most_rows) * hidden, 11);
    const size_t cells = static_cast<size_t>(most_rows) * blocks_;
    logits_ = Buffer(static_cast<size_t>(most_rows) * vocab * 4);
    choice_ = Buffer(cells * sizeof(BlockChoice));
    sums_ = Buffer(cells * sizeof(float));
    tables_ = Buffer(static_cast<size_t>(most_rows) * vocab * 4);  // bias, output counts and prompt mask: all zero
    SPECRT_CUDA_CHECK(cudaMemset(tables_.as(), 0, tables_.bytes()));
    std::vector<int32_t> request(most_rows), position(most_rows);
    std::vector<int64_t> seeds(most_rows);
    for (int r = 0; r < most_rows; ++r) request[r] = r, position[r] = kPosition + r % 7, seeds[r] = 1234567890123LL * (r + 1);
    request_ = upload(request);
    position_ = upload(position);
    seeds_ = upload(seeds);
    integers_ = upload(std::vector<int32_t>(most_rows * kSamplingI, 0));
    stops_ = upload(std::vector<int32_t>(most_rows, -1));
  }

  void measure(const Case& row, double bandwidth, Report& report) {
    std::vector<float> floats(row.rows * kSamplingF, 0.0f);
    for (int r = 0; r < row.rows; ++r) {
      floats[r * kSamplingF + kTemperature] = row.temperature;
      floats[r * kSamplingF + kTopP] = floats[r * kSamplingF + kRepetition] = 1.0f;
    }
    floats_ = upload(floats);
    const Buffer counts = upload<int32_t>({row.rows, 1});
    const Said said(row.rows);
    Row out;
    out.name = row.name;
    char shape[120];
    std::snprintf(shape, sizeof shape, "%d x %d x %d, T %.1f%s", row.rows, vocab_, hidden_, row.temperature, row.logprob ? ", logprobs" : "");
    out.shape = shape;
    out.correct = check(row, counts.as<int32_t>(), out.checks);
    const Timing ours = time_graph([&](cudaStream_t stream) {
      for (int i = 0; i < kCalls; ++i) choose(row.rows, counts.as<int32_t>(), said, row.logprob, stream);
    });
    const Timing peer = time_graph([&](cudaStream_t stream) {
      for (int i = 0; i < kCalls; ++i) by_logits(row.rows, counts.as<int32_t>(), said, row.logprob, stream);
    });
    out.seconds = ours.seconds / kCalls;
    out.spread = ours.spread;
    out.bytes = static_cast<double>(vocab_) * hidden_ * 2;
    out.floor = out.bytes / bandwidth;
    out.peer = "logits, then the sampler";
    out.peer_seconds = peer.seconds / kCalls;
    report.add(out);
  }

 private:
  LinearParams product(int rows, const int32_t* num_rows) const {
    LinearParams p{};
    p.dtype = DType::kBF16;
    p.out_dtype = DType::kF32;
    p.x = x_.as();
    p.weight = packed_.as();
    p.num_rows = num_rows;
    p.rows = rows;
    p.out_features = vocab_;
    p.in_features = hidden_;
    return p;
  }

  void choose(int rows, const int32_t* num_rows, const Said& said, bool logprob, cudaStream_t stream) const {
    LinearParams p = product(rows, num_rows);
    p.finish = Finish::kChoose;
    p.row_request = request_.as<int32_t>();
    p.row_position = position_.as<int32_t>();
    p.seeds = seeds_.as<int64_t>();
    p.sampling_f = floats_.as<float>();
    p.choice = choice_.as<BlockChoice>();
    p.sums = logprob ? sums_.as<float>() : nullptr;
    launch_linear_cuda(p, stream);
    launch_sample_blocks_cuda({p.choice, p.sums, num_rows, said.token.as<int32_t>(), said.status.as<int32_t>(), logprob ? said.logprob.as<float>() : nullptr, rows, blocks_},
                              stream);
  }

  void by_logits(int rows, const int32_t* num_rows, const Said& said, bool logprob, cudaStream_t stream) const {
    LinearParams p = product(rows, num_rows);
    p.out = logits_.as();
    launch_linear_cuda(p, stream);
    SampleTransformParams t{};
    t.logits = logits_.as<float>();
    t.row_request = request_.as<int32_t>();
    t.row_position = position_.as<int32_t>();
    t.sampling_f = floats_.as<float>();
    t.sampling_i = integers_.as<int32_t>();
    t.stop_ids = stops_.as<int32_t>();
    t.bias = tables_.as<float>();
    t.output_count = tables_.as<int32_t>();
    t.prompt_mask = tables_.as<uint8_t>();
    t.num_rows = num_rows;
    t.status = said.status.as<int32_t>();
    t.rows = rows;
    t.vocab = vocab_;
    t.stops = 1;
    t.seeds = seeds_.as<int64_t>();
    t.token = said.token.as<int32_t>();
    t.keep = logprob;
    launch_sample_transform_cuda(t, stream);
    if (logprob) launch_row_logprobs_cuda({logits_.as<float>(), t.token, num_rows, sums_.as<float>(), said.logprob.as<float>(), nullptr, nullptr, rows, vocab_, 0}, stream);
  }

  static bool same(const Said& a, const Said& b, int rows, bool logprob) {
    auto equal = [rows](const Buffer& x, const Buffer& y) { return download<uint32_t>(x.as(), rows) == download<uint32_t>(y.as(), rows); };
    return equal(a.token, b.token) && equal(a.status, b.status) && (!logprob || equal(a.logprob, b.logprob));
  }

  bool check(const Case& row, const int32_t* counts, std::string& text) const {
    const Said ours(row.rows), bare(row.rows), theirs(row.rows), alone(1), bad(row.rows);
    by_logits(row.rows, counts, theirs, true, nullptr);
    poison(choice_.as(), choice_.bytes());
    choose(row.rows, counts, ours, true, nullptr);
    choose(row.rows, counts, bare, false, nullptr);
    choose(1, counts + 1, alone, true, nullptr);
    const std::vector<int32_t> status = download<int32_t>(ours.status.as(), row.rows);
    const bool right = same(ours, theirs, row.rows, true) && same(bare, theirs, row.rows, false) && same(alone, ours, 1, true) &&
                       std::all_of(status.begin(), status.end(), [](int32_t s) { return s == kStatusOk; });
    // A NaN in the last row, which the others must not notice.
    bf16* last = x_.as<bf16>() + static_cast<int64_t>(row.rows - 1) * hidden_ + hidden_ / 2;
    const std::vector<bf16> before = download<bf16>(last, 1);
    poison(last, sizeof(bf16));
    choose(row.rows, counts, bad, false, nullptr);
    std::vector<int32_t> want = status, tokens = download<int32_t>(ours.token.as(), row.rows);
    want.back() = kStatusNotFinite;
    tokens.back() = 0;
    const bool noticed = download<int32_t>(bad.status.as(), row.rows) == want && download<int32_t>(bad.token.as(), row.rows) == tokens;
    SPECRT_CUDA_CHECK(cudaMemcpy(last, before.data(), sizeof(bf16), cudaMemcpyHostToDevice));
    text = std::string("tokens and logprobs: ") + (right ? "same" : "DIFFER from those of the logits") + (noticed ? "" : ", a NaN went UNNOTICED");
    return right && noticed;
  }

  int vocab_, hidden_, blocks_;
  Buffer packed_, x_, logits_, choice_, sums_, tables_, request_, position_, seeds_, integers_, stops_, floats_;
};

bool measure_all(int argc, char** argv) {
  std::vector<std::string> names;
  for (const Case& row : kCases) names.push_back(row.name);
  const Arguments arguments(argc, argv,
                            "bench_lm_head: lm_head with the choice of a token and without logits, bf16 weights, cold; beside logits and the sampler.\n\n"
                            "  --shape VxK  vocabulary and hidden size (128256x4096)",
                            names, {"--shape"});
  if (arguments.answered()) return true;
  const std::string shape = arguments.value("--shape", "128256x4096");
  int vocab = 0, hidden = 0, end = 0;
  if (std::sscanf(shape.c_str(), "%dx%d%n", &vocab, &hidden, &end) != 2 || end != static_cast<int>(shape.size()) || vocab <= 0 || hidden <= 0 || hidden % 8 ||
      vocab > kTransformVocab)
    fail("--shape: VxK with K a multiple of 8; got '" + shape + "'");
  int most = 1;
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) most = std::max(most, row.rows);
  const std::string card = card_name();
  const double bandwidth = measure_read_bandwidth();
  Bench bench(vocab, hidden, most);
  Report report(arguments.value("--json", ""), card, bandwidth);
  for (const Case& row : kCases)
    if (arguments.wants(row.name)) bench.measure(row, bandwidth, report);
  return report.all_correct();
}

}  // namespace
}  // namespace specrt::bench

int main(int argc, char** argv) {
  return specrt::bench::run("bench_lm_head", [&] { return specrt::bench::measure_all(argc, argv); });
}

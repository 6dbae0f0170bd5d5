#include <vector>

#include "base/squares.h"
#include "norm/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

void rms_norm(Tensor x, Tensor weight, double eps, Tensor num_rows, Tensor out) {
  Checker check("rms_norm", x);
  Sym R("R"), H("H");
  check("x", x, {R, H}, {kF32, kBF16});
  check("weight", weight, {H}, {x.scalar_type()});
  check("num_rows", num_rows, {1}, {kI32});
  check("out", out, {R, H}, {x.scalar_type()});
  if (R == 0) return;
  RmsNormParams p{dtype_of(x), in<void>(x), in<void>(weight), inout<void>(out), static_cast<float>(eps),
                  in<int32_t>(num_rows), static_cast<int>(R), static_cast<int>(H)};
  SPECRT_LAUNCH(rms_norm, check, p);
}

void embedding(Tensor table, Tensor ids, Tensor weight, Tensor num_rows, Tensor out, Tensor scaled, Tensor squares, bool early) {
  Checker check("embedding", table);
  Sym V("V"), H("H"), R("R");
  const auto act = table.scalar_type();
  check("table", table, {V, H}, {kF32, kBF16});
  check("ids", ids, {R}, {kI32});
  check("weight", weight, {H}, {act});
  check("num_rows", num_rows, {1}, {kI32});
  check("out", out, {R, H}, {act});
  check("scaled", scaled, {R, H}, {act});
  check("squares", squares, {R, square_pitch(static_cast<int>(H))}, {kF32});
  if (R == 0) return;
  EmbeddingParams p{dtype_of(table), in<void>(table), in<int32_t>(ids), in<void>(weight), inout<void>(out), inout<void>(scaled), inout<float>(squares), in<int32_t>(num_rows), early,
                    static_cast<int>(R), static_cast<int>(V), static_cast<int>(H)};
  SPECRT_LAUNCH(embedding, check, p);
}

void head_input(Tensor table, Tensor ids, Tensor feature, std::optional<Tensor> parent, std::optional<Tensor> token_weight, std::optional<Tensor> feature_weight, double eps,
                bool feature_first, Tensor num_rows, Tensor joined, std::optional<Tensor> stream, bool stream_normed, bool early) {
  Checker check("head_input", table);
  Sym V("V"), H("H"), R("R"), F("F");
  const auto act = table.scalar_type();
  check("table", table, {V, H}, {kF32, kBF16});
  check("ids", ids, {R}, {kI32});
  check("feature", feature, {F, H}, {act});
  check("parent", parent, {R}, {kI32});
  check("token_weight", token_weight, {H}, {act});
  check("feature_weight", feature_weight, {H}, {act});
  check("num_rows", num_rows, {1}, {kI32});
  check("joined", joined, {R, 2 * H}, {act});
  check("stream", stream, {R, H}, {act});
  check.require(parent.has_value() || F == R, "feature", "a row a token, or parents");
  if (R == 0) return;
  HeadInputParams p{dtype_of(table), in<void>(table), in<int32_t>(ids), in<void>(feature), in<int32_t>(parent), in<void>(token_weight), in<void>(feature_weight),
                    inout<void>(joined), inout<void>(stream), in<int32_t>(num_rows), static_cast<float>(eps), feature_first, stream_normed, early,
                    static_cast<int>(R), static_cast<int>(V), static_cast<int>(F), static_cast<int>(H)};
  SPECRT_LAUNCH(head_input, check, p);
}

void join_rows(std::vector<Tensor> parts, std::vector<Tensor> weights, std::optional<Tensor> source, std::optional<Tensor> missing, double eps, Tensor num_rows, Tensor out) {
  Checker check("join_rows", out);
  Sym F("F"), H("H"), R("R");
  const int64_t count = static_cast<int64_t>(parts.size());
  const auto act = out.scalar_type();
  check.require(count >= 1 && count <= kMostParts, "parts", "1 to 16 tensors");
  check.require(weights.empty() || weights.size() == parts.size(), "weights", "one a part, or none");
  JoinRowsParams p{};
  for (int64_t i = 0; i < count; ++i) {
    check("parts", parts[i], {F, H}, {act});
    p.parts[i] = in<void>(parts[i]);
    if (weights.empty()) continue;
    check("weights", weights[i], {H}, {act});
    p.weights[i] = in<void>(weights[i]);
  }
  check("source", source, {R}, {kI32});
  check("missing", missing, {count * H}, {act});
  check("num_rows", num_rows, {1}, {kI32});
  check("out", out, {R, count * H}, {kF32, kBF16});
  check.require(source.has_value() || F == R, "parts", "a row a row of out, or source");
  if (R == 0) return;
  p.dtype = dtype_of(out);
  p.source = in<int32_t>(source);
  p.missing = in<void>(missing);
  p.out = inout<void>(out);
  p.num_rows = in<int32_t>(num_rows);
  p.eps = static_cast<float>(eps);
  p.count = static_cast<int>(count), p.rows = static_cast<int>(R), p.features = static_cast<int>(F), p.hidden = static_cast<int>(H);
  SPECRT_LAUNCH(join_rows, check, p);
}

void keep_rows(Tensor x, std::optional<Tensor> weight, double eps, Tensor place, Tensor num_rows, Tensor normed, std::optional<Tensor> stream, bool stream_normed) {
  Checker check("keep_rows", x);
  Sym R("R"), H("H"), B("B");
  const auto act = x.scalar_type();
  check("x", x, {R, H}, {kF32, kBF16});
  check("weight", weight, {H}, {act});
  check("place", place, {R}, {kI32});
  check("num_rows", num_rows, {1}, {kI32});
  check("normed", normed, {B, H}, {act});
  check("stream", stream, {B, H}, {act});
  if (R == 0) return;
  KeepRowsParams p{dtype_of(x), in<void>(x), in<void>(weight), in<int32_t>(place), inout<void>(normed), inout<void>(stream), in<int32_t>(num_rows), static_cast<float>(eps),
                   stream_normed, static_cast<int>(R), static_cast<int>(B), static_cast<int>(H)};
  SPECRT_LAUNCH(keep_rows, check, p);
}

}  // namespace

#define SPECRT_NORM_OPS(m)                    \
  m.impl("rms_norm", TORCH_BOX(&rms_norm));   \
  m.impl("embedding", TORCH_BOX(&embedding)); \
  m.impl("head_input", TORCH_BOX(&head_input)); \
  m.impl("join_rows", TORCH_BOX(&join_rows));   \
  m.impl("keep_rows", TORCH_BOX(&keep_rows));

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) { SPECRT_NORM_OPS(m) }
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) { SPECRT_NORM_OPS(m) }

}  // namespace specrt::ops

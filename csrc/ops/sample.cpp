#include "sample/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

void sample_transform(Tensor logits, Tensor row_request, Tensor row_position, std::optional<Tensor> row_node, std::optional<Tensor> tree_token,
                      std::optional<Tensor> tree_ancestors, Tensor sampling_f, Tensor sampling_i, Tensor stop_ids, Tensor bias, Tensor output_count,
                      Tensor prompt_mask, std::optional<Tensor> mask_bits, std::optional<Tensor> row_mask, Tensor num_rows, Tensor status) {
  Checker check("sample_transform", logits);
  Sym R("R"), V("V"), B("B"), N("N"), S("S"), M("masks");
  check("logits", logits, {R, V}, {kF32});
  check("row_request", row_request, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("row_node", row_node, {R}, {kI32});
  check("sampling_f", sampling_f, {B, kSamplingF}, {kF32});
  check("sampling_i", sampling_i, {B, kSamplingI}, {kI32});
  check("tree_token", tree_token, {B, N}, {kI32});
  check("tree_ancestors", tree_ancestors, {B, N}, {kI64});
  check("stop_ids", stop_ids, {B, S}, {kI32});
  check("bias", bias, {B, V}, {kF32});
  check("output_count", output_count, {B, V}, {kI32});
  check("prompt_mask", prompt_mask, {B, V}, {kU8});
  check("mask_bits", mask_bits, {M, (V + 31) / 32}, {kI32});
  check("row_mask", row_mask, {R}, {kI32});
  check("num_rows", num_rows, {1}, {kI32});
  check("status", status, {R}, {kI32});
  check.require(row_node.has_value() == tree_token.has_value() && row_node.has_value() == tree_ancestors.has_value(), "row_node",
                "row_node, tree_token and tree_ancestors together, or None for all three");
  check.require(mask_bits.has_value() == row_mask.has_value(), "mask_bits", "mask_bits and row_mask together, or None for both");
  check.require(!row_node.has_value() || N <= 64, "tree_token", "at most 64 nodes a request");
  if (R == 0 || V == 0) return;
  SampleTransformParams p{inout<float>(logits),     in<int32_t>(row_request),    in<int32_t>(row_position), in<int32_t>(row_node),
                          in<int32_t>(tree_token),  in<int64_t>(tree_ancestors), in<float>(sampling_f),     in<int32_t>(sampling_i),
                          in<int32_t>(stop_ids),    in<float>(bias),             in<int32_t>(output_count), in<uint8_t>(prompt_mask),
                          in<int32_t>(mask_bits),   in<int32_t>(row_mask),       in<int32_t>(num_rows),     inout<int32_t>(status),
                          static_cast<int>(R),      static_cast<int>(V),         row_node.has_value() ? static_cast<int>(N) : 0, static_cast<int>(S)};
  SPECRT_LAUNCH(sample_transform, check, p);
}

void sample_exact(Tensor z, Tensor row_request, Tensor row_position, Tensor seeds, Tensor sampling_f, Tensor num_rows, Tensor token) {
  Checker check("sample_exact", z);
  Sym R("R"), V("V"), B("B");
  check("z", z, {R, V}, {kF32});
  check("row_request", row_request, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("seeds", seeds, {B}, {kI64});
  check("sampling_f", sampling_f, {B, kSamplingF}, {kF32});
  check("num_rows", num_rows, {1}, {kI32});
  check("token", token, {R}, {kI32});
  if (R == 0) return;
  SampleExactParams p{in<float>(z), in<int32_t>(row_request), in<int32_t>(row_position), in<int64_t>(seeds), in<float>(sampling_f), in<int32_t>(num_rows),
                      inout<int32_t>(token), static_cast<int>(R), static_cast<int>(V)};
  SPECRT_LAUNCH(sample_exact, check, p);
}

void row_logprobs(Tensor z, Tensor token, Tensor num_rows, Tensor lse, Tensor logprob, Tensor top_token, Tensor top_logprob) {
  Checker check("row_logprobs", z);
  Sym R("R"), V("V"), n("n");
  check("z", z, {R, V}, {kF32});
  check("token", token, {R}, {kI32});
  check("num_rows", num_rows, {1}, {kI32});
  check("lse", lse, {R}, {kF32});
  check("logprob", logprob, {R}, {kF32});
  check("top_token", top_token, {R, n}, {kI32});
  check("top_logprob", top_logprob, {R, n}, {kF32});
  if (R == 0) return;
  RowLogprobsParams p{in<float>(z), in<int32_t>(token), in<int32_t>(num_rows), inout<float>(lse), inout<float>(logprob), inout<int32_t>(top_token),
                      inout<float>(top_logprob), static_cast<int>(R), static_cast<int>(V), static_cast<int>(n)};
  SPECRT_LAUNCH(row_logprobs, check, p);
}

}  // namespace

#define SPECRT_SAMPLE_OPS(m)                                \
  m.impl("sample_transform", TORCH_BOX(&sample_transform)); \
  m.impl("sample_exact", TORCH_BOX(&sample_exact));         \
  m.impl("row_logprobs", TORCH_BOX(&row_logprobs));

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) { SPECRT_SAMPLE_OPS(m) }
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) { SPECRT_SAMPLE_OPS(m) }

}  // namespace specrt::ops

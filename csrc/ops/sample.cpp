#include "sample/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

void sample_transform(Tensor logits, Tensor row_request, Tensor row_position, std::optional<Tensor> row_node, std::optional<Tensor> tree_token,
                      std::optional<Tensor> tree_ancestors, Tensor sampling_f, Tensor sampling_i, Tensor stop_ids, Tensor bias, Tensor output_count,
                      Tensor prompt_mask, std::optional<Tensor> mask_bits, std::optional<Tensor> row_mask, Tensor num_rows, Tensor status, std::optional<Tensor> seeds,
                      std::optional<Tensor> token, bool keep) {
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
  check("seeds", seeds, {B}, {kI64});
  check("token", token, {R}, {kI32});
  check.require(!check.cuda() || V <= kTransformVocab, "logits", "a vocabulary of at most 393216 tokens on CUDA");
  check.require(seeds.has_value() == token.has_value(), "token", "seeds and token together, or None for both");
  check.require(row_node.has_value() == tree_token.has_value() && row_node.has_value() == tree_ancestors.has_value(), "row_node",
                "row_node, tree_token and tree_ancestors together, or None for all three");
  check.require(mask_bits.has_value() == row_mask.has_value(), "mask_bits", "mask_bits and row_mask together, or None for both");
  check.require(!row_node.has_value() || N <= 64, "tree_token", "at most 64 nodes a request");
  if (R == 0 || V == 0) return;
  SampleTransformParams p{inout<float>(logits),     in<int32_t>(row_request),    in<int32_t>(row_position), in<int32_t>(row_node),
                          in<int32_t>(tree_token),  in<int64_t>(tree_ancestors), in<float>(sampling_f),     in<int32_t>(sampling_i),
                          in<int32_t>(stop_ids),    in<float>(bias),             in<int32_t>(output_count), in<uint8_t>(prompt_mask),
                          in<int32_t>(mask_bits),   in<int32_t>(row_mask),       in<int32_t>(num_rows),     inout<int32_t>(status),
                          in<int64_t>(seeds),       inout<int32_t>(token),       keep,                      static_cast<int>(R),
                          static_cast<int>(V),      row_node.has_value() ? static_cast<int>(N) : 0,          static_cast<int>(S)};
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
  check.require(V <= kMaxVocab, "z", kVocabText);
  if (R == 0) return;
  RowLogprobsParams p{in<float>(z), in<int32_t>(token), in<int32_t>(num_rows), inout<float>(lse), inout<float>(logprob), inout<int32_t>(top_token),
                      inout<float>(top_logprob), static_cast<int>(R), static_cast<int>(V), static_cast<int>(n)};
  SPECRT_LAUNCH(row_logprobs, check, p);
}

void draft_topk(Tensor z, Tensor row_request, Tensor row_position, Tensor seeds, Tensor sampling_f, int64_t noise, Tensor num_rows, Tensor perturbed,
                Tensor token, Tensor score) {
  Checker check("draft_topk", z);
  Sym R("R"), V("V"), B("B"), k("k");
  check("z", z, {R, V}, {kF32});
  check("row_request", row_request, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("seeds", seeds, {B}, {kI64});
  check("sampling_f", sampling_f, {B, kSamplingF}, {kF32});
  check("num_rows", num_rows, {1}, {kI32});
  check("perturbed", perturbed, {R, V}, {kF32});
  check("token", token, {R, k}, {kI32});
  check("score", score, {R, k}, {kF32});
  check.require(noise >= -1 && noise <= 3, "noise", "-1 (none) or a NOISE_* purpose");
  check.require(k >= 1 && k <= 64, "token", "1 to 64 columns");
  check.require(V <= kMaxVocab, "z", kVocabText);
  if (R == 0) return;
  DraftTopkParams p{in<float>(z), in<int32_t>(row_request), in<int32_t>(row_position), in<int64_t>(seeds), in<float>(sampling_f), in<int32_t>(num_rows),
                    inout<float>(perturbed), inout<int32_t>(token), inout<float>(score), static_cast<int>(noise), static_cast<int>(R), static_cast<int>(V),
                    static_cast<int>(k)};
  SPECRT_LAUNCH(draft_topk, check, p);
}

void draft_children(Tensor logits, int64_t slot_rows, int64_t level, std::optional<Tensor> ids, Tensor row_request, Tensor row_position, int64_t ahead, Tensor sampling_f,
                    Tensor sampling_i, Tensor stop_ids, Tensor bias, Tensor seeds, int64_t noise, bool of_head, Tensor num_rows, Tensor token, std::optional<Tensor> score) {
  Checker check("draft_children", logits);
  Sym L("L"), R("R"), D("D"), V("V"), B("B"), S("S"), k("k");
  check("logits", logits, {L, D}, {kF32});
  check("ids", ids, {D}, {kI64});
  check("row_request", row_request, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("sampling_f", sampling_f, {B, kSamplingF}, {kF32});
  check("sampling_i", sampling_i, {B, kSamplingI}, {kI32});
  check("stop_ids", stop_ids, {B, S}, {kI32});
  check("bias", bias, {B, V}, {kF32});
  check("seeds", seeds, {B}, {kI64});
  check("num_rows", num_rows, {1}, {kI32});
  check("token", token, {R, k}, {kI32});
  check("score", score, {R, k}, {kF32});
  check.require(slot_rows > 0 ? level >= 0 && level < slot_rows && L >= B * slot_rows : slot_rows == 0 && L >= R, "logits", "a row a row, or slot_rows a slot, one of them for the level");
  check.require(noise >= -1 && noise <= 3, "noise", "-1 (none) or a NOISE_* purpose");
  check.require(k >= 1 && k <= 64, "token", "1 to 64 columns");
  check.require(D <= (check.cuda() ? kChildrenVocab : kMaxVocab), "logits", check.cuda() ? "a vocabulary of at most 327680 tokens on CUDA" : kVocabText);
  if (R == 0 || V == 0 || D == 0) return;
  DraftChildrenParams p{in<float>(logits),     in<int64_t>(ids),       in<int32_t>(row_request), in<int32_t>(row_position), in<float>(sampling_f),
                        in<int32_t>(sampling_i), in<int32_t>(stop_ids), in<float>(bias),          in<int64_t>(seeds),        in<int32_t>(num_rows),
                        inout<int32_t>(token), inout<float>(score),    static_cast<int>(ahead),   static_cast<int>(noise),   static_cast<int>(R),
                        static_cast<int>(D),   static_cast<int>(V),    static_cast<int>(S),       static_cast<int>(k),       static_cast<int>(slot_rows),
                        static_cast<int>(level), of_head};
  SPECRT_LAUNCH(draft_children, check, p);
}

void accept_rejection(Tensor z, Tensor row_status, Tensor row_offset, Tensor tree_token, Tensor tree_parent, Tensor tree_size, Tensor seq_lens, Tensor q,
                      Tensor q_levels, Tensor seeds, Tensor sampling_f, Tensor scratch, Tensor path, Tensor path_len, Tensor emitted, Tensor error) {
  Checker check("accept_rejection", z);
  Sym R("R"), V("V"), B("B"), N("N"), D("D");
  check("z", z, {R, V}, {kF32});
  check("row_status", row_status, {R}, {kI32});
  check("tree_token", tree_token, {B, N}, {kI32});
  check("row_offset", row_offset, {B + 1}, {kI32});
  check("tree_parent", tree_parent, {B, N}, {kI32});
  check("tree_size", tree_size, {B}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  check("q", q, {B, D, V}, {kF32});
  check("q_levels", q_levels, {B}, {kI32});
  check("seeds", seeds, {B}, {kI64});
  check("sampling_f", sampling_f, {B, kSamplingF}, {kF32});
  check("scratch", scratch, {B, 2, V}, {kF32});
  check("path", path, {B, N}, {kI32});
  check("path_len", path_len, {B}, {kI32});
  check("emitted", emitted, {B, N}, {kI32});
  check("error", error, {B}, {kI32});
  check.require(V <= kMaxVocab, "z", kVocabText);
  if (B == 0) return;
  AcceptRejectionParams p{in<float>(z),           in<int32_t>(row_status), in<int32_t>(row_offset), in<int32_t>(tree_token), in<int32_t>(tree_parent),
                          in<int32_t>(tree_size), in<int32_t>(seq_lens),   in<float>(q),            in<int32_t>(q_levels),   in<int64_t>(seeds),
                          in<float>(sampling_f),  inout<float>(scratch),   inout<int32_t>(path),    inout<int32_t>(path_len), inout<int32_t>(emitted),
                          inout<int32_t>(error),  static_cast<int>(B),     static_cast<int>(N),     static_cast<int>(D),     static_cast<int>(V)};
  SPECRT_LAUNCH(accept_rejection, check, p);
}

}  // namespace

#define SPECRT_SAMPLE_OPS(m)                                \
  m.impl("sample_transform", TORCH_BOX(&sample_transform)); \
  m.impl("sample_exact", TORCH_BOX(&sample_exact));         \
  m.impl("row_logprobs", TORCH_BOX(&row_logprobs));         \
  m.impl("draft_topk", TORCH_BOX(&draft_topk));             \
  m.impl("draft_children", TORCH_BOX(&draft_children));     \
  m.impl("accept_rejection", TORCH_BOX(&accept_rejection));

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) { SPECRT_SAMPLE_OPS(m) }
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) { SPECRT_SAMPLE_OPS(m) }

}  // namespace specrt::ops

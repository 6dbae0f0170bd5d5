#include <cmath>

#include "ops/checks.h"
#include "tree/params.h"

namespace specrt::ops {
namespace {

int as_int(int64_t x) { return static_cast<int>(x); }

void require_nodes(const Checker& check, const char* arg, int64_t nodes) {
  check.require(nodes >= 1 && nodes <= kMaxNodes, arg, "between 1 and 64 nodes a slot");
}

Paging paging_of(Checker& check, const Tensor& block_table, int64_t page_size, Sym& B) {
  Sym pages("max_pages");
  check("block_table", block_table, {B, pages}, {kI32});
  check.require(page_size > 0, "page_size", "a positive page size");
  return {in<int32_t>(block_table), as_int(pages), as_int(page_size)};
}

void tree_build(Tensor tree_token, Tensor tree_parent, Tensor active, Tensor tree_size, Tensor seq_lens, Tensor block_table, int64_t page_size, Tensor tree_depth,
                Tensor tree_ancestors, Tensor row_offset, Tensor row_request, Tensor row_node, Tensor row_token, Tensor row_position, Tensor row_prefix,
                Tensor row_slot, Tensor row_ancestors, Tensor num_rows) {
  Checker check("tree_build", tree_token);
  Sym B("B"), N("N"), R("R");
  check("tree_token", tree_token, {B, N}, {kI32});
  check("tree_parent", tree_parent, {B, N}, {kI32});
  require_nodes(check, "tree_token", N);
  check("active", active, {B}, {kI32});
  check("tree_size", tree_size, {B}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  const Paging paging = paging_of(check, block_table, page_size, B);
  check("tree_depth", tree_depth, {B, N}, {kI32});
  check("tree_ancestors", tree_ancestors, {B, N}, {kI64});
  check("row_offset", row_offset, {B + 1}, {kI32});
  check("row_request", row_request, {R}, {kI32});
  check("row_node", row_node, {R}, {kI32});
  check("row_token", row_token, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("row_prefix", row_prefix, {R}, {kI32});
  check("row_slot", row_slot, {R}, {kI64});
  check("row_ancestors", row_ancestors, {R}, {kI64});
  check("num_rows", num_rows, {1}, {kI32});
  check.require(B >= 1, "tree_token", "at least one slot");
  TreeBuildParams p{in<int32_t>(tree_token), in<int32_t>(tree_parent), in<int32_t>(active), inout<int32_t>(tree_size), in<int32_t>(seq_lens), paging,
                    inout<int32_t>(tree_depth), inout<int64_t>(tree_ancestors), inout<int32_t>(row_offset), inout<int32_t>(row_request),
                    inout<int32_t>(row_node), inout<int32_t>(row_token), inout<int32_t>(row_position), inout<int32_t>(row_prefix),
                    inout<int64_t>(row_slot), inout<int64_t>(row_ancestors), inout<int32_t>(num_rows), as_int(B), as_int(N), as_int(R)};
  SPECRT_LAUNCH(tree_build, check, p);
}

void span_rows(Tensor history, Tensor start, Tensor end, Tensor block_table, int64_t page_size, Tensor row_offset, Tensor row_request, Tensor row_token,
               Tensor row_position, Tensor row_prefix, Tensor row_slot, Tensor num_rows) {
  Checker check("span_rows", history);
  Sym B("B"), T("T"), R("R");
  check("history", history, {B, T}, {kI32});
  check("start", start, {B}, {kI32});
  check("end", end, {B}, {kI32});
  const Paging paging = paging_of(check, block_table, page_size, B);
  check("row_offset", row_offset, {B + 1}, {kI32});
  check("row_request", row_request, {R}, {kI32});
  check("row_token", row_token, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("row_prefix", row_prefix, {R}, {kI32});
  check("row_slot", row_slot, {R}, {kI64});
  check("num_rows", num_rows, {1}, {kI32});
  check.require(B >= 1, "history", "at least one slot");
  SpanRowsParams p{in<int32_t>(history), in<int32_t>(start), in<int32_t>(end), paging, inout<int32_t>(row_offset), inout<int32_t>(row_request),
                   inout<int32_t>(row_token), inout<int32_t>(row_position), inout<int32_t>(row_prefix), inout<int64_t>(row_slot),
                   inout<int32_t>(num_rows), as_int(B), as_int(T), as_int(R)};
  SPECRT_LAUNCH(span_rows, check, p);
}

void path_rows(Tensor history, Tensor seq_lens, Tensor path_len, Tensor max_nodes, std::optional<Tensor> levels, int64_t most_levels, int64_t mask_token, Tensor path,
               Tensor row_offset, Tensor block_table, int64_t page_size, Tensor row_request, Tensor row_token, Tensor row_position, Tensor row_prefix, Tensor row_slot,
               Tensor row_source, Tensor row_place, Tensor num_rows) {
  Checker check("path_rows", history);
  Sym B("B"), T("T"), N("N"), R("R");
  check("history", history, {B, T}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  check("path_len", path_len, {B}, {kI32});
  check("max_nodes", max_nodes, {B}, {kI32});
  check("levels", levels, {B}, {kI32});
  check.require(most_levels >= 1, "most_levels", "at least 1");
  check("path", path, {B, N}, {kI32});
  check("row_offset", row_offset, {B + 1}, {kI32});
  const Paging paging = paging_of(check, block_table, page_size, B);
  check("row_request", row_request, {R}, {kI32});
  check("row_token", row_token, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("row_prefix", row_prefix, {R}, {kI32});
  check("row_slot", row_slot, {R}, {kI64});
  check("row_source", row_source, {R}, {kI32});
  check("row_place", row_place, {R}, {kI32});
  check("num_rows", num_rows, {1}, {kI32});
  check.require(B >= 1, "history", "at least one slot");
  PathRowsParams p{in<int32_t>(history), in<int32_t>(seq_lens), in<int32_t>(path_len), in<int32_t>(max_nodes), in<int32_t>(levels), in<int32_t>(path),
                   in<int32_t>(row_offset), paging, inout<int32_t>(row_request), inout<int32_t>(row_token), inout<int32_t>(row_position), inout<int32_t>(row_prefix),
                   inout<int64_t>(row_slot), inout<int32_t>(row_source), inout<int32_t>(row_place), inout<int32_t>(num_rows), as_int(B), as_int(T), as_int(N), as_int(R),
                   as_int(most_levels), as_int(mask_token)};
  SPECRT_LAUNCH(path_rows, check, p);
}

AcceptWalkParams walk_params(Checker& check, Sym& B, const Tensor& tree_token, const Tensor& tree_parent, const Tensor& tree_size, const Tensor& row_offset,
                             const Tensor& row_target, const Tensor& row_status, const Tensor& path, const Tensor& path_len, const Tensor& emitted,
                             const Tensor& error) {
  Sym N("N"), R("R");
  check("tree_token", tree_token, {B, N}, {kI32});
  check("tree_parent", tree_parent, {B, N}, {kI32});
  require_nodes(check, "tree_token", N);
  check("tree_size", tree_size, {B}, {kI32});
  check("row_offset", row_offset, {B + 1}, {kI32});
  check("row_target", row_target, {R}, {kI32});
  check("row_status", row_status, {R}, {kI32});
  check("path", path, {B, N}, {kI32});
  check("path_len", path_len, {B}, {kI32});
  check("emitted", emitted, {B, N}, {kI32});
  check("error", error, {B}, {kI32});
  check.require(B >= 1, "tree_token", "at least one slot");
  return {in<int32_t>(tree_token), in<int32_t>(tree_parent), in<int32_t>(tree_size), in<int32_t>(row_offset), in<int32_t>(row_target),
          in<int32_t>(row_status), inout<int32_t>(path), inout<int32_t>(emitted), inout<int32_t>(path_len), inout<int32_t>(error), as_int(B), as_int(N)};
}

void accept_walk(Tensor tree_token, Tensor tree_parent, Tensor tree_size, Tensor row_offset, Tensor row_target, Tensor row_status, Tensor path,
                 Tensor path_len, Tensor emitted, Tensor error) {
  Checker check("accept_walk", tree_token);
  Sym B("B");
  AcceptWalkParams p = walk_params(check, B, tree_token, tree_parent, tree_size, row_offset, row_target, row_status, path, path_len, emitted, error);
  SPECRT_LAUNCH(accept_walk, check, p);
}

void accept_synthetic(Tensor tree_token, Tensor tree_parent, Tensor tree_size, Tensor row_offset, Tensor row_target, Tensor row_status, Tensor seq_lens,
                      Tensor seeds, double acceptance_length, Tensor path, Tensor path_len, Tensor emitted, Tensor error) {
  Checker check("accept_synthetic", tree_token);
  Sym B("B");
  AcceptWalkParams tree = walk_params(check, B, tree_token, tree_parent, tree_size, row_offset, row_target, row_status, path, path_len, emitted, error);
  check("seq_lens", seq_lens, {B}, {kI32});
  check("seeds", seeds, {B}, {kI64});
  check.require(acceptance_length >= 1 && acceptance_length <= kMaxNodes, "acceptance_length", "a mean between 1 and 64 tokens a round");
  const double whole = std::floor(acceptance_length);
  AcceptSyntheticParams p{tree, in<int32_t>(seq_lens), in<int64_t>(seeds), static_cast<int>(whole), static_cast<float>(acceptance_length - whole)};
  SPECRT_LAUNCH(accept_synthetic, check, p);
}

void round_advance(Tensor path_len, Tensor emitted, Tensor limit, Tensor seq_lens, Tensor history, Tensor output_count, Tensor active, Tensor tree_token) {
  Checker check("round_advance", path_len);
  Sym B("B"), N("N"), T("T"), V("V");
  check("path_len", path_len, {B}, {kI32});
  check("emitted", emitted, {B, N}, {kI32});
  check("limit", limit, {B}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  check("history", history, {B, T}, {kI32});
  check("output_count", output_count, {B, V}, {kI32});
  check("active", active, {B}, {kI32});
  check("tree_token", tree_token, {B, N}, {kI32});
  check.require(B >= 1, "path_len", "at least one slot");
  RoundAdvanceParams p{in<int32_t>(path_len), in<int32_t>(emitted), in<int32_t>(limit), inout<int32_t>(seq_lens), inout<int32_t>(history),
                       inout<int32_t>(output_count), inout<int32_t>(active), inout<int32_t>(tree_token), as_int(B), as_int(N), as_int(T), as_int(V)};
  SPECRT_LAUNCH(round_advance, check, p);
}

void ngram_propose(Tensor history, Tensor seq_lens, Tensor max_nodes, Tensor max_depth, int64_t min_n, int64_t max_n, int64_t branches, Tensor seeds,
                   Tensor sampling_f, Tensor tree_token, Tensor tree_parent, Tensor tree_size) {
  Checker check("ngram_propose", history);
  Sym B("B"), T("T"), N("N");
  check("history", history, {B, T}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  check("max_nodes", max_nodes, {B}, {kI32});
  check("max_depth", max_depth, {B}, {kI32});
  check("seeds", seeds, {B}, {kI64});
  check("sampling_f", sampling_f, {B, 6}, {kF32});
  check("tree_token", tree_token, {B, N}, {kI32});
  check("tree_parent", tree_parent, {B, N}, {kI32});
  check("tree_size", tree_size, {B}, {kI32});
  require_nodes(check, "tree_token", N);
  check.require(min_n >= 1, "min_n", "at least 1");
  check.require(max_n >= min_n && max_n <= T, "max_n", "at least min_n and at most the history's capacity");
  check.require(branches >= 1, "branches", "at least 1");
  check.require(B >= 1, "history", "at least one slot");
  NgramProposeParams p{in<int32_t>(history), in<int32_t>(seq_lens), in<int32_t>(max_nodes), in<int32_t>(max_depth), in<int64_t>(seeds),
                       in<float>(sampling_f), inout<int32_t>(tree_token), inout<int32_t>(tree_parent), inout<int32_t>(tree_size),
                       as_int(min_n), as_int(max_n), as_int(branches), as_int(B), as_int(N), as_int(T)};
  SPECRT_LAUNCH(ngram_propose, check, p);
}

// Checks the sizes of an expansion of `levels` levels against the candidates' capacity.
void require_expansion(const Checker& check, int64_t levels, int64_t width, int64_t topk, int64_t candidates) {
  check.require(levels >= 1 && levels <= kMaxNodes, "level", "between 1 and 64");
  check.require(width >= 1 && width <= topk, "beam_width", "at least 1 and at most k");
  check.require(topk <= 64, "topk", "at most 64 children a node");
  const int64_t need = topk + (levels - 1) * width * topk;
  check.require(need <= kMaxCandidates, "level", "at most 4096 candidates a slot: k + (levels - 1) W k");
  check.require(candidates >= need, "cand_token", "room for k + (levels - 1) W k = " + std::to_string(need) + " candidates a slot");
}

void draft_limits(Tensor max_nodes, Tensor max_depth, Tensor seq_lens, Tensor active, int64_t lag, Tensor nodes, Tensor depth, std::optional<Tensor> base) {
  Checker check("draft_limits", max_nodes);
  Sym B("B");
  check("max_nodes", max_nodes, {B}, {kI32});
  check("max_depth", max_depth, {B}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  check("active", active, {B}, {kI32});
  check("nodes", nodes, {B}, {kI32});
  check("depth", depth, {B}, {kI32});
  check("base", base, {B}, {kI32});
  if (B == 0) return;
  DraftLimitsParams p{in<int32_t>(max_nodes), in<int32_t>(max_depth), in<int32_t>(seq_lens), in<int32_t>(active), inout<int32_t>(nodes), inout<int32_t>(depth),
                      inout<int32_t>(base), as_int(B), as_int(lag)};
  SPECRT_LAUNCH(draft_limits, check, p);
}

void tree_expand(int64_t level, int64_t beam_width, Tensor topk_token, std::optional<Tensor> topk_score, Tensor max_depth, Tensor seq_lens, Tensor block_table,
                 int64_t page_size, Tensor cand_token, Tensor cand_parent, Tensor cand_score, Tensor beam, Tensor row_request, Tensor row_token,
                 Tensor row_position, Tensor row_prefix, Tensor row_slot, Tensor row_path, Tensor row_parent, Tensor num_rows) {
  Checker check("tree_expand", topk_token);
  Sym rows("rows"), k("k"), B("B"), C("C"), R("R"), depth("depth");
  check("topk_token", topk_token, {rows, k}, {kI32});
  check("topk_score", topk_score, {rows, k}, {kF32});
  check("max_depth", max_depth, {B}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  const Paging paging = paging_of(check, block_table, page_size, B);
  check("cand_token", cand_token, {B, C}, {kI32});
  check("cand_parent", cand_parent, {B, C}, {kI32});
  check("cand_score", cand_score, {B, C}, {kF32});
  check("beam", beam, {B, beam_width}, {kI32});
  check("row_request", row_request, {R}, {kI32});
  check("row_token", row_token, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("row_prefix", row_prefix, {R}, {kI32});
  check("row_slot", row_slot, {R}, {kI64});
  check("row_path", row_path, {R, depth}, {kI32});
  check("row_parent", row_parent, {R}, {kI32});
  check("num_rows", num_rows, {1}, {kI32});
  check.require(B >= 1, "max_depth", "at least one slot");
  require_expansion(check, level, beam_width, k, C);
  check.require(level > 1 || rows >= B, "topk_token", "a row a slot at level 1");
  check.require(R >= B * beam_width, "row_request", "room for beam_width rows a slot");
  check.require(depth >= level, "row_path", "a path of at least `level` entries");
  TreeExpandParams p{in<int32_t>(topk_token), in<float>(topk_score), in<int32_t>(max_depth), in<int32_t>(seq_lens), paging,
                     inout<int32_t>(cand_token), inout<int32_t>(cand_parent), inout<float>(cand_score), inout<int32_t>(beam),
                     inout<int32_t>(row_request), inout<int32_t>(row_token), inout<int32_t>(row_position), inout<int32_t>(row_prefix),
                     inout<int64_t>(row_slot), inout<int32_t>(row_path), inout<int32_t>(row_parent), inout<int32_t>(num_rows),
                     as_int(level), as_int(beam_width), as_int(k), as_int(B), as_int(C), as_int(depth), as_int(rows)};
  SPECRT_LAUNCH(tree_expand, check, p);
}

void tree_select(int64_t levels, int64_t beam_width, int64_t topk, Tensor max_nodes, Tensor max_depth, Tensor cand_token, Tensor cand_parent, Tensor cand_score,
                 Tensor tree_token, Tensor tree_parent, Tensor tree_size) {
  Checker check("tree_select", max_nodes);
  Sym B("B"), C("C"), N("N");
  check("max_nodes", max_nodes, {B}, {kI32});
  check("max_depth", max_depth, {B}, {kI32});
  check("cand_token", cand_token, {B, C}, {kI32});
  check("cand_parent", cand_parent, {B, C}, {kI32});
  check("cand_score", cand_score, {B, C}, {kF32});
  check("tree_token", tree_token, {B, N}, {kI32});
  check("tree_parent", tree_parent, {B, N}, {kI32});
  check("tree_size", tree_size, {B}, {kI32});
  require_nodes(check, "tree_token", N);
  check.require(B >= 1, "max_nodes", "at least one slot");
  require_expansion(check, levels, beam_width, topk, C);
  TreeSelectParams p{in<int32_t>(max_nodes), in<int32_t>(max_depth), in<int32_t>(cand_token), in<int32_t>(cand_parent), in<float>(cand_score),
                     inout<int32_t>(tree_token), inout<int32_t>(tree_parent), inout<int32_t>(tree_size),
                     as_int(levels), as_int(beam_width), as_int(topk), as_int(B), as_int(C), as_int(N)};
  SPECRT_LAUNCH(tree_select, check, p);
}

}  // namespace

#define SPECRT_TREE_OPS(m)                                \
  m.impl("tree_build", TORCH_BOX(&tree_build));           \
  m.impl("span_rows", TORCH_BOX(&span_rows));             \
  m.impl("accept_walk", TORCH_BOX(&accept_walk));         \
  m.impl("accept_synthetic", TORCH_BOX(&accept_synthetic)); \
  m.impl("round_advance", TORCH_BOX(&round_advance));     \
  m.impl("ngram_propose", TORCH_BOX(&ngram_propose));     \
  m.impl("path_rows", TORCH_BOX(&path_rows));             \
  m.impl("draft_limits", TORCH_BOX(&draft_limits));       \
  m.impl("tree_expand", TORCH_BOX(&tree_expand));         \
  m.impl("tree_select", TORCH_BOX(&tree_select));

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) { SPECRT_TREE_OPS(m) }
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) { SPECRT_TREE_OPS(m) }

}  // namespace specrt::ops

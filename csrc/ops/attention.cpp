#include "attention/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

// The checks both ops share; the fields that only trees have are left empty.
AttentionParams describe(Checker& check, Sym& R, const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table,
                         const Tensor& row_request, const Tensor& row_prefix, double scale, int64_t window, const Tensor& num_rows, Tensor& out, double k_scale,
                         double v_scale) {
  Sym Hq("Hq"), Hkv("Hkv"), D("D"), P("P"), pages("pages"), B("B"), M("max_pages");
  check("q", q, {R, Hq, D}, {kF32, kBF16});
  check("k_pool", k_pool, {pages, Hkv, P, D}, {q.scalar_type(), kE4M3});
  check("v_pool", v_pool, {pages, Hkv, P, D}, {k_pool.scalar_type()});
  check.pool_scale("k_scale", k_scale, k_pool);
  check.pool_scale("v_scale", v_scale, v_pool);
  check("block_table", block_table, {B, M}, {kI32});
  check("row_request", row_request, {R}, {kI32});
  check("row_prefix", row_prefix, {R}, {kI32});
  check("num_rows", num_rows, {1}, {kI32});
  check("out", out, {R, Hq, D}, {q.scalar_type()});
  check.require(Hkv > 0 && Hq % Hkv == 0, "q", "query heads a multiple of the " + std::to_string(Hkv) + " KV heads, not " + std::to_string(Hq));
  check.require(P == 16 || P == 32 || P == 64, "k_pool", "pages of 16, 32 or 64 tokens, not " + std::to_string(P));
  check.aligned("q", q);
  check.aligned("k_pool", k_pool);
  check.aligned("v_pool", v_pool);
  check.aligned("out", out);
  check.require(window >= 0, "window", "0 (none) or a positive number of positions");
  if (check.cuda()) {
    check.require(D == 64 || D == 96 || D == 128, "q", "a head dim of 64, 96 or 128 on CUDA, not " + std::to_string(D));
    check.require(Hq / Hkv <= 16, "q", "at most 16 query heads a KV head on CUDA, not " + std::to_string(Hq / Hkv));
  } else {
    check.require(D > 0 && D % 16 == 0, "q", "a head dim that is a multiple of 16, not " + std::to_string(D));
  }
  return {dtype_of(q), dtype_of(k_pool), in<void>(q), in<void>(k_pool), in<void>(v_pool), in<int32_t>(block_table), in<int32_t>(row_request), in<int32_t>(row_prefix),
          nullptr, nullptr, static_cast<float>(scale), static_cast<float>(k_scale), static_cast<float>(v_scale), static_cast<int>(window), in<int32_t>(num_rows), nullptr, nullptr, inout<void>(out),
          static_cast<int>(R), static_cast<int>(B), static_cast<int>(Hq), static_cast<int>(Hkv), static_cast<int>(D), static_cast<int>(P), static_cast<int>(M),
          static_cast<int>(pages), 0};
}

void check_plan(Checker& check, int64_t ints, int64_t rows) {
  const int64_t need = plan_ints(static_cast<int>(rows));
  check.require(ints >= need, "plan", "at least " + std::to_string(need) + " ints (ops.attention_workspace for as many rows)");
}

void attention_plan(Tensor row_request, Tensor row_prefix, std::optional<Tensor> ancestors, std::optional<Tensor> paths, Tensor num_rows, int64_t requests,
                    int64_t q_heads, int64_t kv_heads, int64_t max_len, bool fp8, Tensor plan) {
  Checker check("attention_plan", row_request);
  Sym R("R"), depth("depth"), L("ints");
  check("row_request", row_request, {R}, {kI32});
  check("row_prefix", row_prefix, {R}, {kI32});
  check("ancestors", ancestors, {R}, {kI64});
  check("paths", paths, {R, depth}, {kI32});
  check.require(!(ancestors.has_value() && paths.has_value()), "paths", "None where ancestors are given");
  check("num_rows", num_rows, {1}, {kI32});
  check("plan", plan, {L}, {kI32});
  check.aligned("plan", plan);
  check.require(requests > 0, "requests", "a positive number");
  check.require(max_len >= 0, "max_len", "the number of positions that a row of the block table holds");
  check.require(kv_heads > 0 && q_heads % kv_heads == 0, "q_heads", "a multiple of the KV heads, " + std::to_string(kv_heads) + ", not " + std::to_string(q_heads));
  if (check.cuda()) check_plan(check, L, R);
  if (R == 0) return;
  const AttentionPlanParams p{in<int32_t>(row_request), in<int32_t>(row_prefix), in<int64_t>(ancestors), in<int32_t>(paths), in<int32_t>(num_rows), inout<int32_t>(plan),
                              static_cast<int>(R), static_cast<int>(requests), static_cast<int>(q_heads), static_cast<int>(kv_heads), static_cast<int>(max_len),
                              paths.has_value() ? static_cast<int>(depth) : 0, fp8};
  SPECRT_LAUNCH(attention_plan, check, p);
}

void tree_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor row_request, Tensor row_prefix, std::optional<Tensor> ancestors,
                    std::optional<Tensor> paths, double scale, int64_t window, Tensor num_rows, Tensor plan, Tensor workspace, Tensor out, double k_scale, double v_scale) {
  Checker check("tree_attention", q);
  Sym R("R"), depth("depth"), W("floats"), L("ints");
  AttentionParams p = describe(check, R, q, k_pool, v_pool, block_table, row_request, row_prefix, scale, window, num_rows, out, k_scale, v_scale);
  check("ancestors", ancestors, {R}, {kI64});
  check("paths", paths, {R, depth}, {kI32});
  check.require(!(ancestors.has_value() && paths.has_value()), "paths", "None where ancestors are given");
  check("plan", plan, {L}, {kI32});
  check("workspace", workspace, {W}, {kF32});
  check.aligned("workspace", workspace);
  if (check.cuda()) {
    check_plan(check, L, R);
    const int64_t chunks = (static_cast<int64_t>(p.max_pages) * p.page + kChunk - 1) / kChunk, need = R * p.q_heads * chunks * (p.head_dim + 2);
    check.require(W >= need, "workspace", "at least " + std::to_string(need) + " floats (ops.attention_workspace with max_len >= max_pages * P)");
  }
  if (R == 0) return;
  p.ancestors = in<int64_t>(ancestors);
  p.paths = in<int32_t>(paths);
  p.path_depth = paths.has_value() ? static_cast<int>(depth) : 0;
  p.plan = in<int32_t>(plan);
  p.workspace = inout<float>(workspace);
  SPECRT_LAUNCH(tree_attention, check, p);
}

void prefill_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor row_request, Tensor row_prefix, double scale, int64_t window,
                       Tensor num_rows, Tensor out, double k_scale, double v_scale) {
  Checker check("prefill_attention", q);
  Sym R("R");
  const AttentionParams p = describe(check, R, q, k_pool, v_pool, block_table, row_request, row_prefix, scale, window, num_rows, out, k_scale, v_scale);
  if (R == 0) return;
  SPECRT_LAUNCH(prefill_attention, check, p);
}

}  // namespace

#define SPECRT_ATTENTION_OPS(m)                         \
  m.impl("attention_plan", TORCH_BOX(&attention_plan)); \
  m.impl("tree_attention", TORCH_BOX(&tree_attention)); \
  m.impl("prefill_attention", TORCH_BOX(&prefill_attention));

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) { SPECRT_ATTENTION_OPS(m) }
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) { SPECRT_ATTENTION_OPS(m) }

}  // namespace specrt::ops

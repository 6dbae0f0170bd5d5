#include "kv/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

void rope_append(Tensor qkv, Tensor positions, Tensor slots, Tensor cos, Tensor sin, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double eps,
                 Tensor num_rows, Tensor q, Tensor k_pool, Tensor v_pool, double k_scale, double v_scale) {
  Checker check("rope_append", qkv);
  Sym R("R"), Hq("Hq"), Hkv("Hkv"), D("D"), P("P"), pages("pages"), positions_known("max_position");
  const ScalarType act = q.scalar_type();
  check("q", q, {R, Hq, D}, {kF32, kBF16});
  check("k_pool", k_pool, {pages, Hkv, P, D}, {act, kE4M3});
  check("v_pool", v_pool, {pages, Hkv, P, D}, {k_pool.scalar_type()});
  check.pool_scale("k_scale", k_scale, k_pool);
  check.pool_scale("v_scale", v_scale, v_pool);
  check("qkv", qkv, {R, (Hq + 2 * Hkv) * D}, {act});
  check("positions", positions, {R}, {kI32});
  check("slots", slots, {R}, {kI64});
  check.require(D % 16 == 0 && D > 0, "q", "a head dim that is a multiple of 16");
  if (check.cuda()) check.require(D <= 256, "q", "a head dim of at most 256");
  check("cos", cos, {positions_known, D / 2}, {kF32});
  check("sin", sin, {positions_known, D / 2}, {kF32});
  check("q_norm", q_norm, {D}, {act});
  check("k_norm", k_norm, {D}, {act});
  check("num_rows", num_rows, {1}, {kI32});
  if (R == 0) return;
  RopeAppendParams p{dtype_of(q), dtype_of(k_pool), in<void>(qkv), in<int32_t>(positions), in<int64_t>(slots), in<float>(cos), in<float>(sin), in<void>(q_norm),
                     in<void>(k_norm), static_cast<float>(eps), in<int32_t>(num_rows), inout<void>(q), inout<void>(k_pool), inout<void>(v_pool),
                     static_cast<float>(k_scale), static_cast<float>(v_scale), static_cast<int>(R), static_cast<int>(Hq), static_cast<int>(Hkv), static_cast<int>(D), static_cast<int>(P),
                     static_cast<int>(positions_known)};
  SPECRT_LAUNCH(rope_append, check, p);
}

void kv_commit(Tensor k_pools, Tensor v_pools, Tensor block_table, Tensor seq_lens, Tensor path, Tensor path_len) {
  Checker check("kv_commit", k_pools);
  Sym L("L"), pages("pages"), Hkv("Hkv"), P("P"), D("D"), B("B"), M("max_pages"), N("N");
  check("k_pools", k_pools, {L, pages, Hkv, P, D}, {kF32, kBF16, kE4M3});
  check("v_pools", v_pools, {L, pages, Hkv, P, D}, {k_pools.scalar_type()});
  check("block_table", block_table, {B, M}, {kI32});
  check("seq_lens", seq_lens, {B}, {kI32});
  check("path", path, {B, N}, {kI32});
  check("path_len", path_len, {B}, {kI32});
  check.require(D % 16 == 0 && D > 0, "k_pools", "a head dim that is a multiple of 16");
  check.aligned("k_pools", k_pools);
  check.aligned("v_pools", v_pools);
  if (B == 0 || L == 0 || Hkv == 0) return;
  KvCommitParams p{dtype_of(k_pools), inout<void>(k_pools), inout<void>(v_pools), in<int32_t>(block_table), in<int32_t>(seq_lens), in<int32_t>(path),
                   in<int32_t>(path_len), static_cast<int>(L), static_cast<int>(pages), static_cast<int>(Hkv), static_cast<int>(P), static_cast<int>(D),
                   static_cast<int>(B), static_cast<int>(M), static_cast<int>(N)};
  SPECRT_LAUNCH(kv_commit, check, p);
}

}  // namespace

#define SPECRT_KV_OPS(m)                          \
  m.impl("rope_append", TORCH_BOX(&rope_append)); \
  m.impl("kv_commit", TORCH_BOX(&kv_commit));

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) { SPECRT_KV_OPS(m) }
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) { SPECRT_KV_OPS(m) }

}  // namespace specrt::ops

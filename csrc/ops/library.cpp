// Every op's schema, by room; what each means is documented in specrt/ops.py, which mirrors this file. No logic here: the bindings are
// in the file named as the room. "(a!)" marks what an op writes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(specrt, m) {
  // gemm
  m.def("pack_linear(Tensor weight, Tensor(a!) packed) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor num_rows, Tensor(a!) out, Tensor? squares, float eps) -> ()");
  m.def("linear_silu(Tensor x, Tensor weight, Tensor? bias, Tensor num_rows, Tensor(a!) out, Tensor? squares, float eps) -> ()");
  m.def(
      "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor num_rows, Tensor residual, Tensor(a!) residual_out, Tensor? next_weight"
      ", Tensor(b!)? scaled, Tensor(c!)? next_squares) -> ()");
  m.def(
      "linear_sample(Tensor x, Tensor weight, int out_features, Tensor num_rows, Tensor row_request, Tensor row_position, Tensor seeds, Tensor sampling_f"
      ", Tensor(a!) token, Tensor(b!) status, Tensor(c!)? logprob) -> ()");
  m.def("quantize_fp8(Tensor x, Tensor num_rows, Tensor(a!) q, Tensor(b!) scale) -> ()");
  m.def(
      "linear_fp8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor num_rows"
      ", Tensor(a!) out, Tensor? squares, float eps) -> ()");
  m.def(
      "linear_fp8_silu(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor num_rows"
      ", Tensor(a!) out, Tensor? squares, float eps) -> ()");
  m.def(
      "linear_fp8_residual(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor num_rows, Tensor residual"
      ", Tensor(a!) residual_out, Tensor? next_weight, Tensor(b!)? scaled, Tensor(c!)? next_squares) -> ()");
  // norm
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor num_rows, Tensor(a!) out) -> ()");
  m.def("embedding(Tensor table, Tensor ids, Tensor weight, Tensor num_rows, Tensor(a!) out, Tensor(b!) scaled, Tensor(c!) squares, bool early) -> ()");
  m.def(
      "head_input(Tensor table, Tensor ids, Tensor feature, Tensor? parent, Tensor? token_weight, Tensor? feature_weight, float eps"
      ", bool feature_first, Tensor num_rows, Tensor(a!) joined, Tensor(b!)? stream, bool stream_normed, bool early) -> ()");
  m.def(
      "join_rows(Tensor[] parts, Tensor[] weights, Tensor? source, Tensor? missing, float eps, Tensor num_rows, Tensor(a!) out) -> ()");
  m.def(
      "keep_rows(Tensor x, Tensor? weight, float eps, Tensor place, Tensor num_rows, Tensor(a!) normed, Tensor(b!)? stream"
      ", bool stream_normed) -> ()");
  // kv
  m.def(
      "rope_append(Tensor qkv, Tensor positions, Tensor slots, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm"
      ", float eps, Tensor num_rows, Tensor(a!) q, Tensor(b!) k_pool, Tensor(c!) v_pool, float k_scale, float v_scale) -> ()");
  m.def(
      "kv_commit(Tensor(a!) k_pools, Tensor(b!) v_pools, Tensor block_table, Tensor seq_lens, Tensor path"
      ", Tensor path_len) -> ()");
  // attention
  m.def(
      "attention_plan(Tensor row_request, Tensor row_prefix, Tensor? ancestors, Tensor? paths, Tensor num_rows, int requests, int q_heads, int kv_heads"
      ", int max_len, bool fp8, Tensor(a!) plan) -> ()");
  m.def(
      "tree_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor row_request"
      ", Tensor row_prefix, Tensor? ancestors, Tensor? paths, float scale, int window, Tensor num_rows"
      ", Tensor plan, Tensor(a!) workspace, Tensor(b!) out, float k_scale, float v_scale) -> ()");
  m.def(
      "prefill_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor row_request"
      ", Tensor row_prefix, float scale, int window, Tensor num_rows, Tensor(a!) out, float k_scale, float v_scale) -> ()");
  // tree
  m.def(
      "tree_build(Tensor tree_token, Tensor tree_parent, Tensor active, Tensor(l!) tree_size, Tensor seq_lens, Tensor block_table"
      ", int page_size, Tensor(a!) tree_depth, Tensor(b!) tree_ancestors, Tensor(c!) row_offset"
      ", Tensor(d!) row_request, Tensor(e!) row_node, Tensor(f!) row_token, Tensor(g!) row_position"
      ", Tensor(h!) row_prefix, Tensor(i!) row_slot, Tensor(j!) row_ancestors, Tensor(k!) num_rows) -> ()");
  m.def(
      "span_rows(Tensor history, Tensor start, Tensor end, Tensor block_table, int page_size, Tensor(a!) row_offset"
      ", Tensor(b!) row_request, Tensor(c!) row_token, Tensor(d!) row_position, Tensor(e!) row_prefix"
      ", Tensor(f!) row_slot, Tensor(g!) num_rows) -> ()");
  m.def(
      "path_rows(Tensor history, Tensor seq_lens, Tensor path_len, Tensor max_nodes, Tensor? levels, int most_levels, int mask_token"
      ", Tensor path, Tensor row_offset, Tensor block_table, int page_size"
      ", Tensor(a!) row_request, Tensor(b!) row_token, Tensor(c!) row_position, Tensor(d!) row_prefix, Tensor(e!) row_slot"
      ", Tensor(f!) row_source, Tensor(g!) row_place, Tensor(h!) num_rows) -> ()");
  m.def(
      "accept_walk(Tensor tree_token, Tensor tree_parent, Tensor tree_size, Tensor row_offset, Tensor row_target"
      ", Tensor row_status, Tensor(a!) path, Tensor(b!) path_len, Tensor(c!) emitted, Tensor(d!) error) -> ()");
  m.def(
      "accept_synthetic(Tensor tree_token, Tensor tree_parent, Tensor tree_size, Tensor row_offset, Tensor row_target"
      ", Tensor row_status, Tensor seq_lens, Tensor seeds, float acceptance_length, Tensor(a!) path"
      ", Tensor(b!) path_len, Tensor(c!) emitted, Tensor(d!) error) -> ()");
  m.def(
      "round_advance(Tensor path_len, Tensor emitted, Tensor limit, Tensor(a!) seq_lens, Tensor(b!) history"
      ", Tensor(c!) output_count, Tensor(d!) active, Tensor(e!) tree_token) -> ()");
  m.def(
      "ngram_propose(Tensor history, Tensor seq_lens, Tensor max_nodes, Tensor max_depth, int min_n, int max_n"
      ", int branches, Tensor seeds, Tensor sampling_f, Tensor(a!) tree_token, Tensor(b!) tree_parent"
      ", Tensor(c!) tree_size) -> ()");
  m.def(
      "draft_limits(Tensor max_nodes, Tensor max_depth, Tensor seq_lens, Tensor active, int lag, Tensor(a!) nodes, Tensor(b!) depth"
      ", Tensor(c!)? base) -> ()");
  m.def(
      "tree_expand(int level, int beam_width, Tensor topk_token, Tensor? topk_score, Tensor max_depth, Tensor seq_lens"
      ", Tensor block_table, int page_size, Tensor(a!) cand_token, Tensor(b!) cand_parent, Tensor(c!) cand_score"
      ", Tensor(d!) beam, Tensor(e!) row_request, Tensor(f!) row_token, Tensor(g!) row_position"
      ", Tensor(h!) row_prefix, Tensor(i!) row_slot, Tensor(j!) row_path, Tensor(k!) row_parent, Tensor(l!) num_rows) -> ()");
  m.def(
      "tree_select(int levels, int beam_width, int topk, Tensor max_nodes, Tensor max_depth, Tensor cand_token"
      ", Tensor cand_parent, Tensor cand_score, Tensor(a!) tree_token, Tensor(b!) tree_parent"
      ", Tensor(c!) tree_size) -> ()");
  // sample
  m.def(
      "sample_transform(Tensor(a!) logits, Tensor row_request, Tensor row_position, Tensor? row_node"
      ", Tensor? tree_token, Tensor? tree_ancestors, Tensor sampling_f, Tensor sampling_i, Tensor stop_ids"
      ", Tensor bias, Tensor output_count, Tensor prompt_mask, Tensor? mask_bits, Tensor? row_mask, Tensor num_rows"
      ", Tensor(b!) status, Tensor? seeds, Tensor(c!)? token, bool keep) -> ()");
  m.def(
      "sample_exact(Tensor z, Tensor row_request, Tensor row_position, Tensor seeds, Tensor sampling_f"
      ", Tensor num_rows, Tensor(a!) token) -> ()");
  m.def(
      "row_logprobs(Tensor z, Tensor token, Tensor num_rows, Tensor(a!) lse, Tensor(b!) logprob, Tensor(c!) top_token"
      ", Tensor(d!) top_logprob) -> ()");
  m.def(
      "draft_topk(Tensor z, Tensor row_request, Tensor row_position, Tensor seeds, Tensor sampling_f, int noise"
      ", Tensor num_rows, Tensor(a!) perturbed, Tensor(b!) token, Tensor(c!) score) -> ()");
  m.def(
      "draft_children(Tensor logits, int slot_rows, int level, Tensor? ids, Tensor row_request, Tensor row_position, int ahead, Tensor sampling_f, Tensor sampling_i"
      ", Tensor stop_ids, Tensor bias, Tensor seeds, int noise, bool of_head, Tensor num_rows, Tensor(a!) token, Tensor(b!)? score) -> ()");
  m.def(
      "accept_rejection(Tensor z, Tensor row_status, Tensor row_offset, Tensor tree_token, Tensor tree_parent"
      ", Tensor tree_size, Tensor seq_lens, Tensor q, Tensor q_levels, Tensor seeds, Tensor sampling_f"
      ", Tensor(a!) scratch, Tensor(b!) path, Tensor(c!) path_len, Tensor(d!) emitted, Tensor(e!) error) -> ()");
}

"""The one door to the compiled extension: one typed function an op.

Conventions, for every op below:

* Tensors are contiguous and on one device; the CPU and the CUDA implementation share the schema. Ops write into tensors that the caller
  allocated and return nothing, so a round can be captured in a CUDA graph.
* ``num_rows`` is an int32 tensor [1] *on the device*: how many of the R packed rows are in use. Rows past it are neither read nor written.
* A request slot is an index b in [0, B). Slot-indexed tensors have B as their first dimension.
* Shapes in brackets; letters as in csrc/base/types.h. ``act`` means bfloat16 or float32, the same for all of a call's act tensors.
* A bad shape, dtype or device raises RuntimeError naming the op, the argument, what it got and what it wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.exists():
    raise ImportError(f"specrt's compiled extension is missing ({_LIBRARY}); build it with `make build` or `pip install .`")
torch.ops.load_library(str(_LIBRARY))
_C = torch.ops.specrt

FP8 = torch.float8_e4m3fn

# Columns of the per-slot sampling tables (csrc/sample/params.h).
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)  # sampling_f float32 [B, 6]
TOP_K, MIN_TOKENS, PROMPT_LEN, HAS_BIAS, HAS_PENALTY = range(5)  # sampling_i int32 [B, 5]

# Row status written by sample_transform.
STATUS_OK, STATUS_NOT_FINITE, STATUS_ALL_MASKED = range(3)

# Philox purposes: independent streams of one request's seed.
NOISE_SHARED, NOISE_DRAFT, NOISE_ACCEPT, NOISE_RESIDUAL = range(4)

# ------------------------------------------------------------------------------------------------ gemm


def packed_linear_shape(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    """Shape of the packed weight of ``linear`` and ``linear_fp8``, zero-padded. The CPU has panels of 64 outputs, [ceil(N/64), ceil(K/g), 64, g] with
    g = 1 for float32 and 2 otherwise (pairs, for the bf16 dot product). CUDA has units of 64 outputs x 128 bytes of k, [ceil(N/64), ceil(K/s), 64, s] with
    s = 64 for bfloat16 and 128 for float8_e4m3fn, each in the order of shared memory (csrc/gemm/params.h), and keeps [N, K] for float32."""
    if torch.device(device).type == "cuda":
        s = 128 // dtype.itemsize
        return (out_features, in_features) if dtype == torch.float32 else ((out_features + 63) // 64, (in_features + s - 1) // s, 64, s)
    g = 1 if dtype == torch.float32 else 2
    return ((out_features + 63) // 64, (in_features + g - 1) // g, 64, g)


def pack_linear(weight: Tensor) -> Tensor:
    """Packs weight [N, K], act for ``linear`` or float8_e4m3fn for ``linear_fp8`` (on CUDA: rows of whole 16 bytes). Returns a new tensor of
    ``packed_linear_shape`` (CUDA float32: the weight itself)."""
    if weight.is_cuda and weight.dtype == torch.float32:
        return weight.contiguous()
    packed = torch.empty(packed_linear_shape(*weight.shape, weight.dtype, weight.device), dtype=weight.dtype, device=weight.device)
    _C.pack_linear(weight.contiguous(), packed)
    return packed


def squares_shape(rows: int, width: int) -> tuple[int, int]:
    """Shape of the sums of squares of rows of ``width`` columns, by blocks of 64: [rows, ceil(width/64) rounded up to 4]."""
    return rows, (width + 255) // 256 * 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: Tensor, out: Tensor, squares: Tensor | None = None, eps: float = 0.0) -> None:
    """out[r] = x[r] W^T + bias. x [R, K] act; weight packed from [N, K]; bias [N] act or None; out [R, N] act, or float32 (then unrounded:
    the form of lm_head). Any K, N (CUDA bf16: K % 8 == 0).

    A deferred RMSNorm of rows h, norm(h) W^T = r (h * norm_weight) W^T with r = 1 / sqrt(mean(h^2) + eps): x = round(h * norm_weight) and ``squares`` float32
    ``squares_shape(R, K)`` come from ``linear_residual`` or ``embedding``, and the sum is multiplied by r before the bias."""
    _C.linear(x, weight, bias, num_rows, out, squares, eps)


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: Tensor, out: Tensor, squares: Tensor | None = None, eps: float = 0.0) -> None:
    """Gate and up projection with SiLU-mul: out[r] = round(round(silu(gate)) * up), gate and up rounded first. out [R, I] act, I % 8 == 0; weight packed from [2I, K] whose rows
    alternate in eights (gate 0-7, up 0-7, gate 8-15, ...; layers.linear.alternate), bias [2I] likewise; the rest as in ``linear``."""
    _C.linear_silu(x, weight, bias, num_rows, out, squares, eps)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: Tensor, residual: Tensor, residual_out: Tensor, next_weight: Tensor | None = None,
                    scaled: Tensor | None = None, next_squares: Tensor | None = None) -> None:
    """residual_out[r] = h = round(residual[r] + round(x[r] W^T + bias)), [R, N] act each (CUDA: N % 4 == 0); residual_out may be residual. With next_weight [N] (of the RMSNorm
    that follows) the first half of that norm too: scaled [R, N] = round(h * next_weight) and next_squares float32 ``squares_shape(R, N)``, for ``linear``."""
    _C.linear_residual(x, weight, bias, num_rows, residual, residual_out, next_weight, scaled, next_squares)


def linear_sample(x: Tensor, weight: Tensor, out_features: int, num_rows: Tensor, row_request: Tensor, row_position: Tensor, seeds: Tensor, sampling_f: Tensor, token: Tensor,
                  status: Tensor, logprob: Tensor | None = None) -> None:
    """lm_head and the choice of a token in one, where nobody wants the logits: what ``linear`` into float32 logits, ``sample_transform`` with no penalty, bias, stop, mask or filter, and
    ``sample_exact`` give, to the bit. x [R, K] act; weight packed from [out_features, K]; the other inputs as in ``sample_transform``, of sampling_f the temperature.

    token, status int32 [R]: as ``sample_transform`` writes them. logprob float32 [R]: of the token, as ``row_logprobs`` gives it of the transformed row; -inf where the status is not OK."""
    _C.linear_sample(x, weight, out_features, num_rows, row_request, row_position, seeds, sampling_f, token, status, logprob)


def fp8_scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of activations [rows, columns]: [ceil(columns/128), rows rounded up to 16]."""
    return ((columns + 127) // 128, (rows + 15) // 16 * 16)


def quantize_fp8(x: Tensor, num_rows: Tensor, q: Tensor, scale: Tensor) -> None:
    """What ``linear_fp8`` makes of its activations: for each row and 128 columns scale = max |x| / 448 (1 for zeros), q = e4m3(x / scale), to nearest even.

    x [R, K] act; q [R, K] float8_e4m3fn out; scale float32 of ``fp8_scale_shape(R, K)`` out: [b, r] is row r's for the columns from 128 b on (CUDA: K % 4 == 0).
    A NaN or an infinity makes NaN of its 128 columns' scale or values."""
    _C.quantize_fp8(x, num_rows, q, scale)


def linear_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, num_rows: Tensor, out: Tensor, squares: Tensor | None = None, eps: float = 0.0) -> None:
    """out[r] = sum over blocks b of 128 k of scale[b, r] weight_scale[b, :] (q[r, b] W[:, b]^T) + bias, in fp32 from block to block; q and scale: x as ``quantize_fp8`` makes them.

    x [R, K] act; weight packed from [N, K] float8_e4m3fn; weight_scale float32 [1, N] (an output) or [ceil(K/128), N] (an output and 128 k); bias float32 [N] or None;
    out [R, N] act or float32. Any K, N (CUDA: K % 16 == 0). squares, eps: as in ``linear``."""
    _C.linear_fp8(x, weight, weight_scale, bias, num_rows, out, squares, eps)


def linear_fp8_silu(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, num_rows: Tensor, out: Tensor, squares: Tensor | None = None, eps: float = 0.0) -> None:
    """``linear_silu`` with the product of ``linear_fp8``; the rows of weight, weight_scale's columns and the bias alternate."""
    _C.linear_fp8_silu(x, weight, weight_scale, bias, num_rows, out, squares, eps)


def linear_fp8_residual(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, num_rows: Tensor, residual: Tensor, residual_out: Tensor,
                        next_weight: Tensor | None = None, scaled: Tensor | None = None, next_squares: Tensor | None = None) -> None:
    """``linear_residual`` with the product of ``linear_fp8``."""
    _C.linear_fp8_residual(x, weight, weight_scale, bias, num_rows, residual, residual_out, next_weight, scaled, next_squares)


# ------------------------------------------------------------------------------------------------ norm (and other row-wise ops)


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_rows: Tensor, out: Tensor) -> None:
    """RMSNorm of [R, H] act rows: out = round(round(x * rsqrt(mean(x^2) + eps)) * weight). ``out`` may be ``x``."""
    _C.rms_norm(x, weight, eps, num_rows, out)


def embedding(table: Tensor, ids: Tensor, weight: Tensor, num_rows: Tensor, out: Tensor, scaled: Tensor, squares: Tensor, early: bool = False) -> None:
    """out[r] = table[ids[r]], and the first half of a deferred RMSNorm (``linear``) of it: scaled[r] = round(out[r] * weight), and the sums of squares of out[r] by blocks.

    table [V, H], weight [H], out, scaled [R, H] act; ids int32 [R]: one outside [0, V) gives rows of NaN; squares float32 ``squares_shape(R, H)``. early, on CUDA: the op before is
    ``attention_plan``, beside which this one may work (csrc/norm/params.h)."""
    _C.embedding(table, ids, weight, num_rows, out, scaled, squares, early)


def head_input(table: Tensor, ids: Tensor, feature: Tensor, parent: Tensor | None, token_weight: Tensor | None, feature_weight: Tensor | None, eps: float, feature_first: bool,
               num_rows: Tensor, joined: Tensor, stream: Tensor | None, stream_normed: bool, early: bool = False) -> None:
    """Rows of an embedding, and ``rms_norm`` of both halves of a draft head's input, to the bit: joined act [R, 2 H] = (token, feature), or (feature, token) with feature_first.

    table act [V, H], ids int32 [R]; feature act [F, H], parent int32 [R]: its row for each, None = its own (F = R). token_weight, feature_weight act [H]: of the norm, None = none. NaN
    for an id or a parent that is outside. stream act [R, H]: the feature once more, after its norm if ``stream_normed``; not one of the inputs. early: as in ``embedding``."""
    _C.head_input(table, ids, feature, parent, token_weight, feature_weight, eps, feature_first, num_rows, joined, stream, stream_normed, early)


def join_rows(parts: list[Tensor], weights: list[Tensor], source: Tensor | None, missing: Tensor | None, eps: float, num_rows: Tensor, out: Tensor) -> None:
    """Rows of several tensors side by side: out act [R, n H] = row source[r] of each of the n parts, act [F, H]; after its ``rms_norm`` with weights act [H], one a part, if there are any.

    source int32 [R], None = each row's own (F = R); -1 takes ``missing`` act [n H] instead of the parts' rows. NaN for a source that is outside. n <= 16."""
    _C.join_rows(parts, weights, source, missing, eps, num_rows, out)


def keep_rows(x: Tensor, weight: Tensor | None, eps: float, place: Tensor, num_rows: Tensor, normed: Tensor, stream: Tensor | None, stream_normed: bool) -> None:
    """``rms_norm`` of some rows, and the rows themselves, to where they are kept: normed[place[r]] = the norm of x[r] (with no weight x[r]), stream[place[r]] = x[r], or with
    stream_normed its norm. x act [R, H], place int32 [R]: outside [0, B), say -1: the row is not kept; normed, stream act [B, H], not x."""
    _C.keep_rows(x, weight, eps, place, num_rows, normed, stream, stream_normed)


# ------------------------------------------------------------------------------------------------ kv


def rope_append(qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
                eps: float, num_rows: Tensor, q: Tensor, k_pool: Tensor, v_pool: Tensor, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """Per-head q/k RMSNorm (where weights are given), RoPE (half-rotation layout), and the append of K and V to their pages.

    qkv [R, (Hq + 2 Hkv) * D] act: q heads, k heads, v heads. positions int32 [R]. slots int64 [R]: page * P + offset, or -1 to write no KV.
    cos, sin float32 [max_position, D/2]. q_norm, k_norm [D] act or None. q [R, Hq, D] act out. k_pool, v_pool [pages, Hkv, P, D] act or both float8_e4m3fn, mutated.
    CUDA: positions, slots and num_rows are read before the wait; they must be older than the op that makes qkv, a linear,
    which waits before it lets the next kernel start (csrc/kv/params.h).
    The rotation is in float32: (x1, x2) -> (fma(x1, c, -(x2 s)), fma(x2, c, x1 s)), rounded once. An FP8 pool gets e4m3(x / scale) of that, to nearest even, saturated to
    +-448; k_scale, v_scale: finite and > 0, 1 for other pools."""
    _C.rope_append(qkv, positions, slots, cos, sin, q_norm, k_norm, eps, num_rows, q, k_pool, v_pool, k_scale, v_scale)


def kv_commit(k_pools: Tensor, v_pools: Tensor, block_table: Tensor, seq_lens: Tensor, path: Tensor, path_len: Tensor) -> None:
    """Makes the accepted path's KV contiguous, for all layers: slot seq_lens[b] + path[b, i] -> seq_lens[b] + i, for 1 <= i < path_len[b].

    k_pools, v_pools [L, pages, Hkv, P, D] act or both float8_e4m3fn, mutated. block_table int32 [B, max_pages]. seq_lens int32 [B]: committed length *before* the commit.
    path int32 [B, N]: accepted nodes in order, path[b, 0] == 0 (the root), ascending. path_len int32 [B], 0 = no such request."""
    _C.kv_commit(k_pools, v_pools, block_table, seq_lens, path, path_len)


# ------------------------------------------------------------------------------------------------ attention


@dataclass
class AttentionWorkspace:
    """Scratch of ``tree_attention``, which only CUDA uses: ``plan`` int32, which block of the GPU does what; ``partials`` float32, one (m, l, O) a row, head and chunk of
    256 positions."""

    plan: Tensor
    partials: Tensor


def attention_workspace(rows: int, q_heads: int, head_dim: int, max_len: int, device: torch.device) -> AttentionWorkspace:
    """For up to ``rows`` rows of at most ``max_len`` positions. Allocate once."""
    chunks, cuda = (max_len + 255) // 256, torch.device(device).type == "cuda"
    return AttentionWorkspace(torch.zeros(4 + 16 * 512 + 13 * rows if cuda else 1, dtype=torch.int32, device=device),
                              torch.empty(rows * q_heads * chunks * (head_dim + 2) if cuda else 1, dtype=torch.float32, device=device))


def attention_plan(row_request: Tensor, row_prefix: Tensor, ancestors: Tensor | None, paths: Tensor | None, num_rows: Tensor, requests: int, q_heads: int,
                   kv_heads: int, max_len: int, fp8: bool, plan: Tensor) -> None:
    """Before the calls of ``tree_attention`` that have these rows (all layers of a forward pass): divides the work. Shapes as there; ``requests`` is B, ``max_len``
    max_pages * P, ``fp8`` whether the pools are float8_e4m3fn (CUDA: the same as in those calls, or rows are left out), ``plan`` int32 of attention_workspace. CUDA: not right before
    one of them, which reads the plan before its wait; a ``linear`` between the two, as in every layer, or an op of torch's suffices (csrc/attention/params.h)."""
    _C.attention_plan(row_request, row_prefix, ancestors, paths, num_rows, requests, q_heads, kv_heads, max_len, fp8, plan)


def tree_attention(q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, row_request: Tensor, row_prefix: Tensor,
                   ancestors: Tensor | None, paths: Tensor | None, scale: float, window: int, num_rows: Tensor, plan: Tensor,
                   workspace: Tensor, out: Tensor, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """Decode, verify and draft-expansion attention over paged KV (few rows a request), after ``attention_plan`` for the same rows; plan, workspace: of attention_workspace.

    q, out [R, Hq, D] act; k_pool, v_pool [pages, Hkv, P, D] act or both float8_e4m3fn (then of ``k_scale`` and ``v_scale``, see ``rope_append``; P V in act as ever);
    block_table int32 [B, max_pages]; row_request int32 [R].
    Row r sees the logical positions 0 .. row_prefix[r]-1 of its request, each in its own slot, and then its path: the key at logical position
    row_prefix[r] + d lies in slot row_prefix[r] + n_d, n_d the d-th node of the path, ascending, the row itself last. The path is given by
    ``ancestors`` int64 [R] (bit j: node j; verify) or ``paths`` int32 [R, depth] (-1 ends it; expansion scratch, beyond 64 slots); with neither,
    or with an empty one, the row sees its prefix only. ``window`` > 0: only the last ``window`` logical positions (the row's own included).
    CUDA: rows of a request stand together and, where they have neither ancestors nor paths, their prefixes ascend: what lies below the first row's is read before the wait."""
    _C.tree_attention(q, k_pool, v_pool, block_table, row_request, row_prefix, ancestors, paths, scale, window, num_rows, plan, workspace, out, k_scale, v_scale)


def prefill_attention(q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, row_request: Tensor, row_prefix: Tensor, scale: float,
                      window: int, num_rows: Tensor, out: Tensor, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """The same attention, same bits, for many rows a request and no trees: row r sees logical positions 0 .. row_prefix[r]-1 (its own
    position + 1). Rows of one request stand together, positions ascending by one. Shapes as ``tree_attention``."""
    _C.prefill_attention(q, k_pool, v_pool, block_table, row_request, row_prefix, scale, window, num_rows, out, k_scale, v_scale)


# ------------------------------------------------------------------------------------------------ tree


def tree_build(tree_token: Tensor, tree_parent: Tensor, active: Tensor, tree_size: Tensor, seq_lens: Tensor, block_table: Tensor, page_size: int,
               tree_depth: Tensor, tree_ancestors: Tensor, row_offset: Tensor, row_request: Tensor, row_node: Tensor, row_token: Tensor,
               row_position: Tensor, row_prefix: Tensor, row_slot: Tensor, row_ancestors: Tensor, num_rows: Tensor) -> None:
    """From nodes and parents: depths, ancestor words, and the packed rows of all requests.

    In: tree_token, tree_parent int32 [B, N] (topological: parent < node; the root's parent is -1), active int32 [B] (0: slot not in this round: its size becomes 0), tree_size
    int32 [B], seq_lens int32 [B], block_table int32 [B, max_pages]. Out: tree_depth int32 [B, N]; tree_ancestors int64 [B, N]; row_offset int32 [B+1] (first row of each
    slot); and by row, slots ascending, nodes ascending: row_request, row_node, row_token, row_position (= seq_len + depth), row_prefix (= seq_len)
    int32 [R], row_slot int64 [R] (page * P + offset of logical slot seq_len + node), row_ancestors int64 [R]; num_rows int32 [1]."""
    _C.tree_build(tree_token, tree_parent, active, tree_size, seq_lens, block_table, page_size, tree_depth, tree_ancestors, row_offset, row_request,
                  row_node, row_token, row_position, row_prefix, row_slot, row_ancestors, num_rows)


def span_rows(history: Tensor, start: Tensor, end: Tensor, block_table: Tensor, page_size: int, row_offset: Tensor, row_request: Tensor,
              row_token: Tensor, row_position: Tensor, row_prefix: Tensor, row_slot: Tensor, num_rows: Tensor) -> None:
    """Packed rows of a span of committed tokens of each slot, positions start[b] .. end[b]-1 (none where end <= start): what a drafter consumes in ``extend``.

    history int32 [B, T]; start, end int32 [B]. Out as in ``tree_build``, with row_prefix = position + 1 and the slot of the position itself. Rows beyond the R capacity are an
    error of the caller."""
    _C.span_rows(history, start, end, block_table, page_size, row_offset, row_request, row_token, row_position, row_prefix, row_slot, num_rows)


def path_rows(history: Tensor, seq_lens: Tensor, path_len: Tensor, max_nodes: Tensor, levels: Tensor | None, most_levels: int, mask_token: int, path: Tensor, row_offset: Tensor,
              block_table: Tensor, page_size: int, row_request: Tensor, row_token: Tensor, row_position: Tensor, row_prefix: Tensor, row_slot: Tensor, row_source: Tensor,
              row_place: Tensor, num_rows: Tensor) -> None:
    """``span_rows`` of what a round has committed, for a head: the last path_len[b] positions below seq_lens[b] (after the round), of slots with max_nodes[b] > 0; and with
    levels int32 [B] (each 1 to most_levels) levels[b] - 1 rows of mask_token behind them.

    history int32 [B, T]; seq_lens, path_len, max_nodes int32 [B]; path int32 [B, N] and row_offset int32 [B + 1] of the round. Rows as ``span_rows`` has them, but row_token is the token
    *behind* the position's own. row_source int32 [R]: the round's row whose feature belongs to the position, -1 of a mask row; row_place int32 [R]: b * most_levels for a slot's last row
    of a token, one more for each mask row behind it, -1 for the rows before it."""
    _C.path_rows(history, seq_lens, path_len, max_nodes, levels, most_levels, mask_token, path, row_offset, block_table, page_size, row_request, row_token, row_position,
                 row_prefix, row_slot, row_source, row_place, num_rows)


def accept_walk(tree_token: Tensor, tree_parent: Tensor, tree_size: Tensor, row_offset: Tensor, row_target: Tensor, row_status: Tensor,
                path: Tensor, path_len: Tensor, emitted: Tensor, error: Tensor) -> None:
    """The exact walk (verification.md 1 and 6): from the root, move to the child whose token is the target's token at this node; at the first
    miss emit that token and stop.

    row_target int32 [R]: the target's token at each row; row_status int32 [R]. Out: path int32 [B, N] (visited nodes, path[b,0] = 0), path_len int32 [B]
    (accepted drafts + 1; 0 where tree_size is 0), emitted int32 [B, N] (path_len tokens: the accepted drafts, then the new root), error int32 [B]:
    the status of the first visited row whose status is not OK (path and emitted then stop before that row's token), else 0."""
    _C.accept_walk(tree_token, tree_parent, tree_size, row_offset, row_target, row_status, path, path_len, emitted, error)


def accept_synthetic(tree_token: Tensor, tree_parent: Tensor, tree_size: Tensor, row_offset: Tensor, row_target: Tensor, row_status: Tensor, seq_lens: Tensor,
                     seeds: Tensor, acceptance_length: float, path: Tensor, path_len: Tensor, emitted: Tensor, error: Tensor) -> None:
    """``accept_walk`` with the decision overridden (benchmarks only): along first children, floor(A) or ceil(A) nodes are visited so that the mean
    is ``acceptance_length`` A >= 1, by a coin of (seed, position); never more than the tree has. Emits the drafts, then the target's token at the last node."""
    _C.accept_synthetic(tree_token, tree_parent, tree_size, row_offset, row_target, row_status, seq_lens, seeds, acceptance_length, path, path_len,
                        emitted, error)


def round_advance(path_len: Tensor, emitted: Tensor, limit: Tensor, seq_lens: Tensor, history: Tensor, output_count: Tensor, active: Tensor, tree_token: Tensor) -> None:
    """Commits a round's tokens and makes the next round's state: history[b, seq_len+1+i] = emitted[b, i], output_count[b, token] += 1, seq_lens[b] += path_len[b];
    the new root tree_token[b, 0] is the last token emitted (unchanged where there is none); active[b] = 0 where seq_lens[b] has come to limit[b].

    limit int32 [B]; history int32 [B, T], seq_lens int32 [B], output_count int32 [B, V], active int32 [B], tree_token int32 [B, N]; all mutated but limit."""
    _C.round_advance(path_len, emitted, limit, seq_lens, history, output_count, active, tree_token)


def ngram_propose(history: Tensor, seq_lens: Tensor, max_nodes: Tensor, max_depth: Tensor, min_n: int, max_n: int, branches: int, seeds: Tensor,
                  sampling_f: Tensor, tree_token: Tensor, tree_parent: Tensor, tree_size: Tensor) -> None:
    """Prompt lookup (vLLM's rule): the longest n in [min_n, max_n] whose last n tokens occur earlier in the history (known tokens: history[b, 0..seq_lens[b]]);
    the tokens after an occurrence are the draft.

    max_nodes int32 [B]: most draft nodes for the slot (0: leave the slot alone); max_depth int32 [B]. branches == 1: a chain; at temperature 0 the *earliest*
    occurrence of the longest n. branches > 1: up to 32 occurrences (longest n first, earliest first; then shorter n) are merged into a trie with counts, and the best
    max_nodes nodes by cumulative score are kept, at most ``branches`` children a node. A child's score is log(count / sum of its siblings' counts), at
    temperature > 0 plus the shared noise of (seed, position, token) and renormalised (log-softmax over siblings); a chain at temperature > 0 follows the best
    child. Writes nodes 1.. of tree_token/tree_parent int32 [B, N] and tree_size int32 [B] (root included; node 0 is left as it is) where max_nodes > 0."""
    _C.ngram_propose(history, seq_lens, max_nodes, max_depth, min_n, max_n, branches, seeds, sampling_f, tree_token, tree_parent, tree_size)


def draft_limits(max_nodes: Tensor, max_depth: Tensor, seq_lens: Tensor, active: Tensor, lag: int, nodes: Tensor, depth: Tensor, base: Tensor | None) -> None:
    """What the slots' trees may grow to, int32 [B] each: nodes and depth are max_nodes and max_depth, and 0 for a slot that is not active, has no drafter (max_nodes 0), or has
    nothing committed that a tree could grow from; base, where it is wanted, = seq_lens - lag, for ``tree_expand``."""
    _C.draft_limits(max_nodes, max_depth, seq_lens, active, lag, nodes, depth, base)


def tree_expand(level: int, beam_width: int, topk_token: Tensor, topk_score: Tensor | None, max_depth: Tensor, seq_lens: Tensor, block_table: Tensor, page_size: int,
                cand_token: Tensor, cand_parent: Tensor, cand_score: Tensor, beam: Tensor, row_request: Tensor, row_token: Tensor, row_position: Tensor,
                row_prefix: Tensor, row_slot: Tensor, row_path: Tensor, row_parent: Tensor, num_rows: Tensor) -> None:
    """One level of a drafter's tree expansion (EAGLE-2): appends the children of the current beam to the candidates and picks the next beam.

    level >= 1 is the depth of the children. Let W = beam_width, k = topk_token.shape[1], F(1) = 0, F(l) = k + (l-2) W k the first candidate of level l.
    In: topk_token int32, topk_score float32 [rows, k] (None: 0 for every token, of chains): the children of the beam's rows. Level 1: row b is slot b (rows = B). Later: the rows written by
    the previous call, i.e. the packed rows of active slots, W a slot, slot ascending. A slot is active at this level if max_depth[b] >= level.
    Candidates, [B, C]: cand_token int32, cand_parent int32 (candidate index, -1 = root), cand_score float32 (parent's score + topk_score).
    beam int32 [B, W]: candidate indices; read (level > 1), then replaced by the W best children of this level by cumulative score (ties: lower
    index), in descending order; k >= W. Rows of the next level, for slots with max_depth[b] > level: row_token, row_position = seq_len + level, row_prefix = seq_len + 1,
    row_slot int64 (scratch slot seq_len + 1 + (level-1) W + w for beam entry w, through the block table), row_path int32 [R, depth capacity]: for
    ``tree_attention``: offsets from row_prefix of the path's slots, -1 after the row itself, row_parent: the row of topk_token that the row is a child of."""
    _C.tree_expand(level, beam_width, topk_token, topk_score, max_depth, seq_lens, block_table, page_size, cand_token, cand_parent, cand_score, beam,
                   row_request, row_token, row_position, row_prefix, row_slot, row_path, row_parent, num_rows)


def tree_select(levels: int, beam_width: int, topk: int, max_nodes: Tensor, max_depth: Tensor, cand_token: Tensor, cand_parent: Tensor, cand_score: Tensor,
                tree_token: Tensor, tree_parent: Tensor, tree_size: Tensor) -> None:
    """Re-ranks a finished expansion: keeps the max_nodes[b] best candidates of depth <= max_depth[b] by score (ties: lower index). Scores fall along a path, so
    the choice is closed under parents; a score above its parent's is treated as the parent's. Writes nodes 1.. (candidate index ascending, so topological),
    tree_size[b]; slots with max_nodes[b] == 0 are left alone. Shapes as above."""
    _C.tree_select(levels, beam_width, topk, max_nodes, max_depth, cand_token, cand_parent, cand_score, tree_token, tree_parent, tree_size)


# ------------------------------------------------------------------------------------------------ sample


def sample_transform(logits: Tensor, row_request: Tensor, row_position: Tensor, row_node: Tensor | None, tree_token: Tensor | None, tree_ancestors: Tensor | None,
                     sampling_f: Tensor, sampling_i: Tensor, stop_ids: Tensor, bias: Tensor, output_count: Tensor, prompt_mask: Tensor,
                     mask_bits: Tensor | None, row_mask: Tensor | None, num_rows: Tensor, status: Tensor, seeds: Tensor | None = None, token: Tensor | None = None,
                     keep: bool = True) -> None:
    """Raw logits -> the transformed logits of the distribution sampled from, in place; filtered tokens become -inf.

    logits float32 [R, V], raw. row_position int32 [R]: position of the row's *input* token; the token chosen stands at row_position + 1. Order: finiteness check ->
    repetition, frequency, presence penalty (if HAS_PENALTY) -> bias (if HAS_BIAS) -> stop ids to -inf while output index < min_tokens (output index = row_position + 1 - prompt_len)
    -> mask -> and at temperature > 0: / temperature -> top-k (ties with the k-th kept) -> top-p (smallest set of highest logits with mass >= p of what top-k
    left, ties kept together) -> min-p (p >= min_p * p_max). Temperature 0 keeps the distribution before the last four.
    Penalties count output_count int32 [B, V] plus the tokens of the row's own path (row_node int32 [R], tree_token int32 / tree_ancestors int64 [B, N]: ancestors
    and the node itself but not node 0, which is counted already); repetition also counts prompt_mask uint8 [B, V]. Pass None for the three where rows are not tree nodes.
    sampling_f float32 [B, 6], sampling_i int32 [B, 5], stop_ids int32 [B, S] (-1 pads), bias float32 [B, V]. mask_bits int32 [masks, ceil(V/32)] (bit = allowed),
    row_mask int32 [R]: index of the row's mask, -1 = none. status int32 [R]: STATUS_*, for a row that is not finite or has nothing left.

    With seeds int64 [B] and token int32 [R]: also token[r] = what ``sample_exact`` chooses from the transformed row, 0 where the status is not OK. ``keep`` False: nobody
    reads the logits afterwards; they may be left in any state, and need not be written. CUDA: V <= 393216."""
    _C.sample_transform(logits, row_request, row_position, row_node, tree_token, tree_ancestors, sampling_f, sampling_i, stop_ids, bias, output_count,
                        prompt_mask, mask_bits, row_mask, num_rows, status, seeds, token, keep)


def sample_exact(z: Tensor, row_request: Tensor, row_position: Tensor, seeds: Tensor, sampling_f: Tensor, num_rows: Tensor, token: Tensor) -> None:
    """token[r] = argmax(z + G) with the shared noise of position row_position + 1 (temperature 0: argmax z); lowest id on ties.
    z float32 [R, V] transformed; seeds int64 [B]; token int32 [R]. A NaN never wins; a row with no finite entry gives 0."""
    _C.sample_exact(z, row_request, row_position, seeds, sampling_f, num_rows, token)


def row_logprobs(z: Tensor, token: Tensor, num_rows: Tensor, lse: Tensor, logprob: Tensor, top_token: Tensor, top_logprob: Tensor) -> None:
    """Log-sum-exp of each row, the log-probability of its token, and the n highest (ties: lower id). z float32 [R, V]; token int32 [R]; lse, logprob float32 [R];
    top_token int32, top_logprob float32 [R, n], n >= 0, descending; -1 / -inf where fewer tokens are possible."""
    _C.row_logprobs(z, token, num_rows, lse, logprob, top_token, top_logprob)


def draft_topk(z: Tensor, row_request: Tensor, row_position: Tensor, seeds: Tensor, sampling_f: Tensor, noise: int, num_rows: Tensor, perturbed: Tensor, token: Tensor,
               score: Tensor) -> None:
    """A drafter's children: the k best tokens of each row by z + G, descending, ties by lower id; score = (z + G) - logsumexp(z + G).

    z float32 [R, V] (transformed draft logits, target ids); row_position as in ``sample_exact``. ``noise``: -1 = none (plain top-k), NOISE_SHARED
    (the target's own noise), NOISE_DRAFT (private: the draw order is then exactly sampling without replacement). No noise where temperature is 0.
    perturbed float32 [R, V] is scratch; token int32, score float32 [R, k], k <= 64. Missing tokens: -1 with score -inf."""
    _C.draft_topk(z, row_request, row_position, seeds, sampling_f, noise, num_rows, perturbed, token, score)


def draft_children(logits: Tensor, slot_rows: int, level: int, ids: Tensor | None, row_request: Tensor, row_position: Tensor, ahead: int, sampling_f: Tensor, sampling_i: Tensor,
                   stop_ids: Tensor, bias: Tensor, seeds: Tensor, noise: int, of_head: bool, num_rows: Tensor, token: Tensor, score: Tensor | None) -> None:
    """``sample_transform`` and ``draft_topk`` in one for a drafter of D tokens of its own, where nobody wants its logits: the same children, to the bit, and their scores but for the order
    of the log-sum-exp, which is by blocks of the D columns. But of a head on the target's features (``of_head``), with NOISE_SHARED at temperature T > 0, a token's score is
    T (1.2 z + G), by which heads foretell best what their target chooses (csrc/sample/token.h).

    logits float32 [R, D], raw and left so, or with slot_rows > 0 [B slot_rows, D], of which a row takes row_request * slot_rows + level; ids int64 [D], ascending: the target's id of each column, None = 0, 1, ... (columns past V are left out). Bias, noise and
    stops are the target's, bias float32 [B, V]; there are no penalties and no masks. The child stands at row_position + ahead. token int32, score float32 [R, k] or None, k <= 64: a token that
    the drafter does not have, or that is filtered, is missing (-1, -inf), and so are all of a row that is not finite. CUDA: D <= 327680; with slot_rows 0, all but the logits is read before the wait (csrc/sample/params.h)."""
    _C.draft_children(logits, slot_rows, level, ids, row_request, row_position, ahead, sampling_f, sampling_i, stop_ids, bias, seeds, noise, of_head, num_rows, token, score)


def accept_rejection(z: Tensor, row_status: Tensor, row_offset: Tensor, tree_token: Tensor, tree_parent: Tensor, tree_size: Tensor, seq_lens: Tensor, q: Tensor,
                     q_levels: Tensor, seeds: Tensor, sampling_f: Tensor, scratch: Tensor, path: Tensor, path_len: Tensor, emitted: Tensor, error: Tensor) -> None:
    """Leviathan/Chen rejection on chains, multi-round without replacement on trees (verification.md 2 and 4), batched.

    z float32 [R, V]: transformed target logits of every row. q float32 [B, D, V]: transformed draft logits at depth d of the slot's main path (the parent at depth d drew
    its children from it without replacement, in node order; only first children have children). q_levels int32 [B]: 0 = the slot's drafts are a point
    mass (lookup): children are then tried with cur(x) itself, distinct tokens, any tree. scratch float32 [B, 2, V]. Accept coin of (seed, position, NOISE_ACCEPT, child rank), residual
    by Gumbel-max with NOISE_RESIDUAL. Temperature 0: the greedy walk. Outputs as ``accept_walk``."""
    _C.accept_rejection(z, row_status, row_offset, tree_token, tree_parent, tree_size, seq_lens, q, q_levels, seeds, sampling_f, scratch, path, path_len, emitted, error)

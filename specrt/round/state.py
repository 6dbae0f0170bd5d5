"""RoundState: every device buffer of a round, its shape and who writes it. Nothing here computes."""

from __future__ import annotations

import torch
from torch import Tensor

STOP_IDS = 64  # stop ids a request may have (suppressed until min_tokens)


class RoundState:
    """B slots, N nodes a slot (root included), R = B * N rows, V vocabulary, T history capacity, M pages a slot.

    Between two rounds the truth is ``history`` and ``seq_lens``: history[b, : seq_lens[b]] has its KV in the pages ("committed"), and
    history[b, seq_lens[b]] is the root, the last known token, whose KV the next round writes; tree_token[b, 0] has it too."""

    def __init__(self, batch: int, nodes: int, vocab: int, history: int, max_pages: int, device: torch.device):
        self.batch, self.nodes, self.rows, self.vocab, self.device = batch, nodes, batch * nodes, vocab, device
        i32 = dict(dtype=torch.int32, device=device)
        i64 = dict(dtype=torch.int64, device=device)
        f32 = dict(dtype=torch.float32, device=device)

        # Requests: written by the host when a request enters or leaves a slot, and by round_advance.
        self.history: Tensor = torch.zeros(batch, history, **i32)
        self.seq_lens: Tensor = torch.zeros(batch, **i32)
        self.active: Tensor = torch.zeros(batch, **i32)  # 1: takes part in rounds; a round that reaches ``limit`` makes it 0
        self.limit: Tensor = torch.zeros(batch, **i32)  # committed length at which the slot's request is over
        self.block_table: Tensor = torch.zeros(batch, max_pages, **i32)
        self.seeds: Tensor = torch.zeros(batch, **i64)
        self.sampling_f: Tensor = torch.zeros(batch, 6, **f32)  # columns: ops.TEMPERATURE ...
        self.sampling_i: Tensor = torch.zeros(batch, 5, **i32)  # columns: ops.TOP_K ...
        self.stop_ids: Tensor = torch.full((batch, STOP_IDS), -1, **i32)
        self.bias: Tensor = torch.zeros(batch, vocab, **f32)
        self.output_count: Tensor = torch.zeros(batch, vocab, **i32)
        self.prompt_mask: Tensor = torch.zeros(batch, vocab, dtype=torch.uint8, device=device)
        self.mask_bits: Tensor | None = None  # int32 [B * N, ceil(V/32)], made when the first request with a token mask is admitted
        self.masked: Tensor = torch.zeros(batch, **i32)  # 1: the slot's rows have masks

        # What the host reads after a round, in one copy: views of one flat buffer.
        sizes = [("path_len", (batch,)), ("error", (batch,)), ("tree_size", (batch,)), ("row_offset", (batch + 1,)), ("tree_token", (batch, nodes)),
                 ("tree_parent", (batch, nodes)), ("tree_depth", (batch, nodes)), ("path", (batch, nodes)), ("emitted", (batch, nodes))]
        self.readback: Tensor = torch.zeros(sum(torch.Size(shape).numel() for _, shape in sizes), **i32)
        self.readback_views: dict[str, tuple[int, tuple[int, ...]]] = {}
        at = 0
        for name, shape in sizes:
            self.readback_views[name] = (at, shape)
            size = torch.Size(shape).numel()
            setattr(self, name, self.readback[at : at + size].view(shape))
            at += size
        self.tree_parent[:, 0] = -1
        self.tree_ancestors: Tensor = torch.zeros(batch, nodes, **i64)

        # Packed rows of the round (tree_build) and what is computed for each.
        self.row_request: Tensor = torch.zeros(self.rows, **i32)
        self.row_node: Tensor = torch.zeros(self.rows, **i32)
        self.row_token: Tensor = torch.zeros(self.rows, **i32)
        self.row_position: Tensor = torch.zeros(self.rows, **i32)
        self.row_prefix: Tensor = torch.zeros(self.rows, **i32)
        self.row_slot: Tensor = torch.zeros(self.rows, **i64)
        self.row_ancestors: Tensor = torch.zeros(self.rows, **i64)
        self.row_status: Tensor = torch.zeros(self.rows, **i32)
        self.row_target: Tensor = torch.zeros(self.rows, **i32)  # the token the target chooses after this row
        self.num_rows: Tensor = torch.zeros(1, **i32)
        self.logits: Tensor = torch.empty(self.rows, vocab, **f32)

    @staticmethod
    def vocabulary_bytes(batch: int, nodes: int, vocab: int) -> int:
        """Of the buffers as wide as the vocabulary, which are nearly all there is: logits of every row; bias, output_count and prompt_mask of every slot."""
        return batch * vocab * (4 * nodes + 4 + 4 + 1)

    # Annotations of the views made above.
    path_len: Tensor  # int32 [B]: accepted drafts + 1; 0 = not in the round
    error: Tensor  # int32 [B]: ops.STATUS_* of the row where the walk stopped
    tree_size: Tensor  # int32 [B]: 1 from the slot's activation on, then what its drafter writes; tree_build makes it 0 where the slot is not active
    row_offset: Tensor  # int32 [B+1]
    tree_token: Tensor  # int32 [B, N]
    tree_parent: Tensor  # int32 [B, N]
    tree_depth: Tensor  # int32 [B, N]
    path: Tensor  # int32 [B, N]: visited nodes
    emitted: Tensor  # int32 [B, N]: path_len tokens


class LogprobRows:
    """What a round says of its rows where log-probabilities are wanted, ``top`` of them beside the row's own: views of one flat buffer."""

    def __init__(self, rows: int, top: int, device: torch.device, pinned: bool = False):
        self.rows, self.top = rows, top
        self.flat: Tensor = torch.zeros(rows * (1 + 2 * top), dtype=torch.int32, device=device, pin_memory=pinned)
        chosen, token, logprob = self.flat.split([rows, rows * top, rows * top])
        self.chosen: Tensor = chosen.view(torch.float32)  # [rows]: of the token the row chose
        self.top_token: Tensor = token.view(rows, top)
        self.top_logprob: Tensor = logprob.view(torch.float32).view(rows, top)


class SpanRows:
    """Packed rows of spans of committed tokens (ops.span_rows), capacity R: prompt chunks, and what a drafter consumes."""

    def __init__(self, batch: int, rows: int, device: torch.device):
        i32 = dict(dtype=torch.int32, device=device)
        self.bounds: Tensor = torch.zeros(2, batch, **i32)
        self.start: Tensor = self.bounds[0]
        self.end: Tensor = self.bounds[1]
        self.row_offset: Tensor = torch.zeros(batch + 1, **i32)
        self.request: Tensor = torch.zeros(rows, **i32)
        self.token: Tensor = torch.zeros(rows, **i32)
        self.position: Tensor = torch.zeros(rows, **i32)
        self.prefix: Tensor = torch.zeros(rows, **i32)
        self.slot: Tensor = torch.zeros(rows, dtype=torch.int64, device=device)
        self.num_rows: Tensor = torch.zeros(1, **i32)
        self.rows = rows

"""PromptRows: prompt chunks through the target. Not a round: no tree, no sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.dense import DenseModel
from specrt.round.admission import upload
from specrt.round.result import read_columns
from specrt.round.state import RoundState, SpanRows

LOGIT_ROWS = 64  # rows of prompt logits held at a time


class PromptRows:
    """Buffers for a chunk of at most ``rows`` prompt tokens of any slots."""

    def __init__(self, target: DenseModel, pool: KVPool, state: RoundState, rows: int, page_size: int, features: list[int]):
        self.target, self.pool, self.state, self.page_size = target, pool, state, page_size
        self.span = SpanRows(state.batch, rows, state.device)
        sp = self.span
        self.batch = RowBatch(token=sp.token, position=sp.position, request=sp.request, prefix=sp.prefix, slot=sp.slot, num_rows=sp.num_rows,
                              block_table=state.block_table, workspace=ops.attention_workspace(0, 1, 1, 1, state.device), prefill=True)
        self.scratch = target.make_scratch(rows)
        self.features = {j: torch.zeros(rows, target.config.hidden_size, dtype=target.dtype, device=state.device) for j in features}

    def place(self, spans: list[tuple[int, int, int]]) -> int:
        """Host side: says which tokens [start, end) of which slots the next ``forward`` runs; returns the row capacity to give it."""
        total = sum(end - start for _, start, end in spans)
        if total > self.span.rows:
            raise ValueError(f"prefill: {total} rows in one chunk, at most {self.span.rows}")
        bounds = np.zeros((2, self.state.batch), dtype=np.int32)
        for slot, start, end in spans:
            bounds[:, slot] = start, end
        self.span.bounds.copy_(upload(bounds, self.state.device))
        return row_bucket(total, self.span.rows)

    def forward(self, rows: int) -> tuple[RowBatch, dict[int, Tensor]]:
        """Device side: what was placed, through the target. The batch, and the target's features of its rows."""
        s, sp = self.state, self.span
        ops.span_rows(s.history, sp.start, sp.end, s.block_table, self.page_size, sp.row_offset, sp.request, sp.token, sp.position, sp.prefix, sp.slot, sp.num_rows)
        batch = self.batch.head(rows)
        features = {j: f[:rows] for j, f in self.features.items()}
        self.target.forward(batch, self.pool, self.scratch, features)
        return batch, features

    def logprobs(self, spans: list[tuple[int, int, int]], rows: int, wanted: dict[int, int]) -> dict[int, Any]:
        """{slot: (logprob [len], top_token [len, n], top_logprob [len, n])} of the tokens that follow the rows of the last ``forward``, from the untransformed
        distribution; numpy."""
        hidden = self.scratch.view(rows).scaled
        out: dict[int, Any] = {}
        at = 0
        for slot, start, end in sorted(spans):  # the rows' order
            if slot in wanted:
                following = self.state.history[slot, start + 1 : end + 1]
                parts = [self._block(hidden[at + i : at + min(i + LOGIT_ROWS, end - start)], following[i : i + LOGIT_ROWS], wanted[slot])
                         for i in range(0, end - start, LOGIT_ROWS)]
                out[slot] = read_columns(parts)
            at += end - start
        return out

    def _block(self, hidden: Tensor, following: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        n, f32 = hidden.shape[0], dict(dtype=torch.float32, device=hidden.device)
        rows = torch.full((1,), n, dtype=torch.int32, device=hidden.device)
        z, lse, chosen = torch.empty(n, self.state.vocab, **f32), torch.empty(n, **f32), torch.empty(n, **f32)
        top_token, top_logprob = torch.empty(n, top, dtype=torch.int32, device=hidden.device), torch.empty(n, top, **f32)
        self.target.logits(hidden, rows, z)
        ops.row_logprobs(z, following.contiguous(), rows, lse, chosen, top_token, top_logprob)
        return chosen, top_token, top_logprob

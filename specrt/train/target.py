"""TargetRows: whole texts through the target with the runtime's own kernels; what a head reads of them, and what it should say."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.layers.batch import RowBatch
from specrt.models.dense import DenseModel

PAGE = 64  # texts are padded to whole pages
_LOGIT_ROWS = 2048  # rows of the target's logits held at a time


class TargetRows:
    """boundaries: of the residual stream, side by side in the features. target_ids: the head's vocabulary, None = the target's."""

    def __init__(self, target: DenseModel, boundaries: tuple[int, ...], target_ids: Tensor | None):
        self.target, self.boundaries = target, boundaries
        self.target_ids = None if target_ids is None else target_ids.to(target.device)
        self._pool: KVPool | None = None
        self._scratch = target.make_scratch(PAGE)

    @torch.no_grad()
    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids int [B, T], T a multiple of PAGE. (features [B, T, n H], states [B, T, H] after the final norm; the latter valid until the next call)."""
        b, t = ids.shape
        m, device, rows, pages = self.target, ids.device, b * t, t // PAGE
        if self._pool is None or self._pool.k.shape[1] < b * pages:
            self._pool = KVPool(m.num_layers, b * pages, m.kv_heads, PAGE, m.head_dim, m.dtype, device)
        if self._scratch.rows < rows:
            self._scratch = m.make_scratch(rows)
        i32 = dict(dtype=torch.int32, device=device)
        position = torch.arange(t, **i32).repeat(b)
        # Row r of the batch has slot r: text b's pages are b * pages and on.
        batch = RowBatch(token=ids.flatten().int(), position=position, request=torch.arange(b, **i32).repeat_interleave(t), prefix=position + 1,
                         slot=torch.arange(rows, dtype=torch.int64, device=device), num_rows=torch.full((1,), rows, **i32),
                         block_table=torch.arange(b * pages, **i32).view(b, pages), workspace=ops.attention_workspace(0, 1, 1, 1, device), prefill=True)
        captured = {j: torch.empty(rows, m.config.hidden_size, dtype=m.dtype, device=device) for j in self.boundaries}
        states = m.forward(batch, self._pool, self._scratch, captured)
        return torch.cat([captured[j] for j in self.boundaries], 1).view(b, t, -1), states.view(b, t, -1)

    @torch.no_grad()
    def teach(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states [N, H]. (log-probabilities over the head's vocabulary, of the target's whole distribution, float32 [N, D]; whether the likeliest token is in it, bool [N])."""
        count, vocab = states.shape[0], self.target.config.vocab_size
        width = vocab if self.target_ids is None else len(self.target_ids)
        logp = torch.empty(count, width, dtype=torch.float32, device=states.device)
        inside = torch.empty(count, dtype=torch.bool, device=states.device)
        z = torch.empty(min(count, _LOGIT_ROWS), vocab, dtype=torch.float32, device=states.device)
        for at in range(0, count, _LOGIT_ROWS):
            part = states[at : at + _LOGIT_ROWS].contiguous()
            n = part.shape[0]
            self.target.logits(part, torch.full((1,), n, dtype=torch.int32, device=states.device), z[:n])
            mine = z[:n] if self.target_ids is None else z[:n, self.target_ids]
            torch.sub(mine, z[:n].logsumexp(1, keepdim=True), out=logp[at : at + n])
            inside[at : at + n] = mine.amax(1) == z[:n].amax(1)
        return logp, inside

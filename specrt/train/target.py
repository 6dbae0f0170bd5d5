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
        if self._pool is None or self._pool.k.shape[1] < b * (pages + 1):  # one more for the trees of ``follow``
            self._pool = KVPool(m.num_layers, b * (pages + 1), m.kv_heads, PAGE, m.head_dim, m.kv_dtype, device, m.kv_scales)
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
    def follow(self, ids: Tensor, slot: Tensor, chains: Tensor) -> Tensor:
        """What the target says before each token of chains [B, M, S], which come after token slot [B] + 1 of the texts that were ``read`` last: states [B, M, S, H]. A tree of at
        most 63 nodes a text, whose root is token slot + 1. Keys from there on are overwritten: ask for later places first."""
        (b, t), (m, steps), model, device = ids.shape, chains.shape[1:], self.target, ids.device
        pages, depth, nodes = t // PAGE, steps - 1, 1 + m * (steps - 1)
        i32 = dict(dtype=torch.int32, device=device)
        table = torch.cat([torch.arange(b * pages, **i32).view(b, pages), b * pages + torch.arange(b, **i32)[:, None]], 1)
        places = (slot + 1)[:, None] + torch.arange(nodes, device=device)  # a node's keys; its position is by its depth
        page = table.gather(1, places // PAGE).long()
        level = torch.cat([torch.zeros(1, **i32), torch.arange(1, steps, **i32).repeat(m)])
        words = [1] + [1 | ((1 << s + 1) - 1) << 1 + c * depth for c in range(m) for s in range(depth)]  # a node, those before it in its chain, and the root
        request = torch.arange(b, **i32).repeat_interleave(nodes)
        token = torch.cat([ids.gather(1, (slot + 1)[:, None]), chains[..., :-1].flatten(1)], 1)
        batch = RowBatch(token=token.flatten().int(), position=((slot + 1)[:, None] + level).flatten().int(), request=request, prefix=(slot + 1).int()[request.long()],
                         slot=(page * PAGE + places % PAGE).flatten(), num_rows=torch.full((1,), b * nodes, **i32), block_table=table,
                         workspace=ops.attention_workspace(b * nodes, model.config.num_heads, model.head_dim, (pages + 1) * PAGE, device),
                         ancestors=torch.tensor(words, dtype=torch.int64, device=device).repeat(b))
        states = model.forward(batch, self._pool, self._scratch).view(b, nodes, -1)
        before = torch.cat([torch.zeros(m, 1, dtype=torch.int64), 1 + torch.arange(m * depth).view(m, depth)], 1).to(device)
        return states[:, before]

    @torch.no_grad()
    def teach(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states [N, H]. (log-probabilities over the head's vocabulary, of the target's whole distribution, float32 [N, D]; whether the likeliest token is in it, bool [N])."""
        count, vocab = states.shape[0], self.target.config.vocab_size
        width = vocab if self.target_ids is None else len(self.target_ids)
        logp = torch.empty(count, width, dtype=torch.float32, device=states.device)
        inside = torch.empty(count, dtype=torch.bool, device=states.device)
        most, i32 = min(count, _LOGIT_ROWS), dict(dtype=torch.int32, device=states.device)
        z, columns = torch.empty(most, vocab, dtype=torch.float32, device=states.device), torch.empty(3, most, 1, dtype=torch.float32, device=states.device)
        token, first = torch.zeros(most, **i32), torch.empty(most, 1, **i32)
        for at in range(0, count, _LOGIT_ROWS):
            part = states[at : at + _LOGIT_ROWS].contiguous()
            n = part.shape[0]
            rows, (lse, unused, best) = torch.full((1,), n, **i32), columns[:, :n]
            self.target.logits(part, rows, z[:n])
            ops.row_logprobs(z[:n], token[:n], rows, lse[:, 0], unused[:, 0], first[:n], best)
            mine = z[:n] if self.target_ids is None else z[:n, self.target_ids]
            torch.sub(mine, lse, out=logp[at : at + n])
            inside[at : at + n] = mine.amax(1) == z[:n].gather(1, first[:n].long())[:, 0]
        return logp, inside

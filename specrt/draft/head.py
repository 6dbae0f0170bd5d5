"""Heads on the target's features (EAGLE-1/2/3, MTP): drafters.md 0 to 4 and 7.

Slot i of such a head holds the feature of token i and token i + 1, at position i: it has one key fewer than there are known tokens, exactly as many as are committed, so its
keys lie in the target's pages, slot by slot. What the target has committed goes in with its true features (``prefill``, ``extend``); the growth of a tree feeds the head's
own outputs back and writes scratch slots behind the committed ones, which the next ``extend`` overwrites."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.draft.base import Drafter
from specrt.draft.expansion import Expansion
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.head import HeadModel
from specrt.round.state import RoundState, SpanRows


class HeadDrafter(Drafter):
    """boundaries: target features that the head takes, in its order; levels, beam_width, topk, noise, keep_logits, choices: as DraftModelDrafter's.

    ``root_hidden`` and ``root_feature`` [B, h] are the outputs of each slot's last true row, from which the next tree grows. A request of one token has no such row before its first
    round, which is therefore one without drafts."""

    #: Rows of ``root_hidden`` a slot has, and how many int32 [B] it uses (None: 1): those behind the first are of mask tokens.
    root_rows: int = 1
    used_rows: Tensor | None = None
    mask_token: int = 0

    def __init__(self, model: HeadModel, boundaries: tuple[int, ...], levels: int, beam_width: int, topk: int, noise: int, keep_logits: bool,
                 choices: tuple[tuple[int, ...], ...] | None = None):
        self.model, self.features = model, boundaries
        self.levels, self.beam_width, self.topk, self.noise, self.keep_logits, self.choices = levels, beam_width, topk, noise, keep_logits, choices
        self.scratch_slots = (levels - 1) * beam_width

    def bytes_per_page(self, page_size: int) -> int:
        m = self.model
        return KVPool.bytes_per_page(m.num_layers, m.kv_heads, page_size, m.head_dim, m.kv_dtype)

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        super().bind(state, pages, page_size, prefill_rows)
        m, device, batch = self.model, state.device, state.batch
        m.size(state.history.shape[1])
        self.pool = KVPool(m.num_layers, pages, m.kv_heads, page_size, m.head_dim, m.kv_dtype, device)
        span_rows = batch * self._rows_a_slot(min(self.levels, state.nodes - 1))
        rows = max(span_rows, batch * self.beam_width)
        workspace = ops.attention_workspace(rows, m.config.layers.num_heads, m.head_dim, state.block_table.shape[1] * page_size, device)
        self.expansion = Expansion(state, page_size, m.vocab, m.target_ids, self.levels, self.beam_width, self.topk, self.noise, self.keep_logits, workspace, 1, self.choices,
                                   of_head=True)
        sp = self.span = SpanRows(batch, span_rows, device)
        self.span_batch = RowBatch(token=sp.token, position=sp.position, request=sp.request, prefix=sp.prefix, slot=sp.slot, num_rows=sp.num_rows,
                                   block_table=state.block_table, workspace=workspace)
        self.source, self.place = torch.zeros_like(sp.token), torch.zeros_like(sp.token)
        self.root_hidden = torch.zeros(batch * self.root_rows, m.hidden_size, dtype=m.dtype, device=device)
        self.root_feature: Tensor | None = torch.zeros_like(self.root_hidden)

    # ---------------------------------------------------------------------------------------- true features

    def prefill(self, batch: RowBatch, end: Tensor, features: dict[int, Tensor]) -> None:
        """Each slot with the token after it; the last of a request, at position ``end`` - 1, is its next root."""
        token = self.state.history[batch.request.long(), (batch.position + 1).long()]
        combined = self.model.combine([features[j] for j in self.features], batch.num_rows)
        self._keep(batch.with_tokens(token), combined, end)

    def extend(self, features: dict[int, Tensor], slots: int, depth: int) -> None:
        s, sp, m = self.state, self.span, self.model
        ops.path_rows(s.history, s.seq_lens, s.path_len, self.max_nodes, self.used_rows, self.root_rows, self.mask_token, s.path, s.row_offset, s.block_table, self.page_size,
                      sp.request, sp.token, sp.position, sp.prefix, sp.slot, self.source, self.place, sp.num_rows)
        batch = self.span_batch.head(row_bucket(slots * self._rows_a_slot(depth), sp.rows))
        combined = m.combine([features[j] for j in self.features], batch.num_rows, self.source[: batch.rows])
        m.keep(batch, combined, self.pool, self.place[: batch.rows], self.root_hidden, self.root_feature)

    def _rows_a_slot(self, depth: int) -> int:
        """Most rows of ``extend`` for a slot whose drafts are ``depth`` deep."""
        return 1 + depth

    def _keep(self, batch: RowBatch, feature: Tensor, end: Tensor) -> None:
        """Runs prompt rows; kept are a slot's last, at position ``end`` - 1, and those behind it."""
        row = batch.position + 1 - end[batch.request.long()]
        place = torch.where(row >= 0, batch.request * self.root_rows + row, -1)
        self.model.keep(batch, feature, self.pool, place, self.root_hidden, self.root_feature)

    # ---------------------------------------------------------------------------------------- drafts

    def propose(self, slots: int, depth: int) -> None:
        s, grow, m = self.state, self.expansion, self.model
        nodes, depths = grow.limits(self.max_nodes, self.max_depth)
        beam = grow.batch.head(row_bucket(slots * self.beam_width, grow.batch.rows))
        m.logits(self.root_hidden, grow.num_slots, grow.logits[: s.batch])
        grow.first(depths)
        feature = self.root_feature
        for level in range(2, depth + 1):
            feature = m.draft(beam, feature, self.pool, grow.parent[: beam.rows], grow.logits[: beam.rows])
            grow.level(level, beam.rows, depths)
        grow.select(nodes, depths, depth)

    def draft_logits(self) -> tuple[Tensor, Tensor] | None:
        return self.expansion.draft_logits(self.max_depth)

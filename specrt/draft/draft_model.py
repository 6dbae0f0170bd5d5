"""An external draft model (drafters.md 8): an independent causal LM with the target's tokeniser and KV pages of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.draft.base import Drafter
from specrt.draft.expansion import Expansion
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.dense import DenseModel
from specrt.round.state import RoundState, SpanRows


class DraftModelDrafter(Drafter):
    """levels: most depth; beam_width, topk, choices: see Expansion; noise: ops.NOISE_* or -1; keep_logits: store q for rejection sampling.

    ``consumed`` int32 [B] counts the tokens whose KV the draft pool holds. A round first feeds what was committed since (the accepted drafts and the new token; after a fully
    accepted chain that includes the last draft, whose KV no step has written), then grows the tree in scratch slots behind it; scratch KV is always thrown away."""

    def __init__(self, model: DenseModel, levels: int, beam_width: int, topk: int, noise: int, keep_logits: bool,
                 choices: tuple[tuple[int, ...], ...] | None = None):
        self.model, self.levels, self.beam_width, self.topk, self.noise, self.keep_logits = model, levels, beam_width, topk, noise, keep_logits
        self.choices = choices
        self.scratch_slots = 1 + (levels - 1) * beam_width
        self.max_positions = model.config.max_position_embeddings

    def bytes_per_page(self, page_size: int) -> int:
        m = self.model
        return KVPool.bytes_per_page(m.num_layers, m.kv_heads, page_size, m.head_dim, m.kv_dtype)

    def bind(self, state: RoundState, pages: int, page_size: int, prefill_rows: int) -> None:
        super().bind(state, pages, page_size, prefill_rows)
        m, device = self.model, state.device
        self.pool = KVPool(m.num_layers, pages, m.kv_heads, page_size, m.head_dim, m.kv_dtype, device, m.kv_scales)
        self.consumed = torch.zeros(state.batch, dtype=torch.int32, device=device)
        span_rows = state.batch * self._rows_a_slot()
        rows = max(span_rows, state.batch * self.beam_width)
        workspace = ops.attention_workspace(rows, m.config.num_heads, m.head_dim, state.block_table.shape[1] * page_size, device)
        self.expansion = Expansion(state, page_size, m.config.vocab_size, None, self.levels, self.beam_width, self.topk, self.noise, self.keep_logits, workspace,
                                   choices=self.choices)
        self.span = SpanRows(state.batch, span_rows, device)
        sp = self.span
        self.span_batch = RowBatch(token=sp.token, position=sp.position, request=sp.request, prefix=sp.prefix, slot=sp.slot, num_rows=sp.num_rows,
                                   block_table=state.block_table, workspace=workspace)
        self.scratch = m.make_scratch(rows)
        self.prefill_scratch = m.make_scratch(prefill_rows)
        self.last_hidden = torch.zeros(state.batch, m.config.hidden_size, dtype=m.dtype, device=device)

    def _rows_a_slot(self) -> int:
        """Most rows that a round feeds for a slot before its tree grows."""
        return self.state.nodes

    def admit(self, slot: int, max_nodes: int, max_depth: int) -> None:
        super().admit(slot, max_nodes, max_depth)
        self.consumed[slot].fill_(0)

    def prefill(self, batch: RowBatch, end: Tensor, features: dict[int, Tensor]) -> None:
        self.model.forward(batch, self.pool, self.prefill_scratch)
        torch.maximum(self.consumed, end, out=self.consumed)

    def propose(self, slots: int, depth: int) -> None:
        s, sp, grow = self.state, self.span, self.expansion
        span_batch = self.span_batch.head(row_bucket(slots * self._rows_a_slot(), sp.rows))
        rows = row_bucket(slots * self.beam_width, grow.batch.rows)
        mine = (self.max_nodes > 0).int() * s.active
        known = (s.seq_lens + 1) * mine  # the root included
        torch.mul(self.consumed, mine, out=sp.start)
        sp.end.copy_(known)
        ops.span_rows(s.history, sp.start, sp.end, s.block_table, self.page_size, sp.row_offset, sp.request, sp.token, sp.position, sp.prefix, sp.slot, sp.num_rows)
        hidden = self.model.forward(span_batch, self.pool, self.scratch)
        torch.index_select(hidden, 0, (sp.row_offset[1:] - 1).clamp_min(0).long(), out=self.last_hidden)
        depths = self.max_depth * mine
        self.model.logits(self.last_hidden, grow.num_slots, grow.logits[: s.batch])
        grow.first(depths)
        beam = grow.batch.head(rows)
        for level in range(2, depth + 1):
            hidden = self.model.forward(beam, self.pool, self.scratch)
            self.model.logits(hidden[:rows], beam.num_rows, grow.logits[:rows])
            grow.level(level, rows, depths)
        grow.select(self.max_nodes * mine, depths, depth)
        torch.where(mine > 0, known, self.consumed, out=self.consumed)

    def draft_logits(self) -> tuple[Tensor, Tensor] | None:
        return self.expansion.draft_logits(self.max_depth)

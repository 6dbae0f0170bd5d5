"""Straight use of a DenseModel: one request, prompt rows or rows one at a time, through shuffled pages."""

from __future__ import annotations

import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.layers.batch import RowBatch
from specrt.models.dense import DenseModel
from tests.kit.compare import poisoned, rows


class Sequence:
    """One request's pages in a pool of its own (page numbers shuffled, page 0 never used), and forward passes over its tokens."""

    def __init__(self, model: DenseModel, max_len: int = 256, page_size: int = 16):
        pages = -(-max_len // page_size)
        self.model, self.page_size, device = model, page_size, model.device
        self.pool = KVPool(model.num_layers, pages + 1, model.kv_heads, page_size, model.head_dim, model.kv_dtype, device, model.kv_scales)
        self.table = (torch.randperm(pages, dtype=torch.int32) + 1)[None].to(device)
        self.scratch = model.make_scratch(max_len)
        self.workspace = ops.attention_workspace(max_len, model.config.num_heads, model.head_dim, pages * page_size, device)

    def forward(self, tokens: list[int], start: int, prefill: bool, features: dict[int, Tensor] | None = None) -> Tensor:
        """Tokens at positions start.. as prompt rows or as decode rows (each seeing its prefix only). Returns logits float32 [len(tokens), V]."""
        position = torch.arange(start, start + len(tokens), dtype=torch.int32, device=self.model.device)
        return self._run(tokens, position, position + 1, position, None, prefill, features)

    def tree(self, tokens: list[int], parents: list[int], start: int) -> Tensor:
        """The rows of a token tree whose root (parent -1) stands at position start; topological. Returns logits float32 [len(tokens), V]."""
        words, depths = [], []
        for node, parent in enumerate(parents):
            words.append(1 << node | (words[parent] if parent >= 0 else 0))
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        device = self.model.device
        position = start + torch.tensor(depths, dtype=torch.int32, device=device)
        slots = start + torch.arange(len(tokens), dtype=torch.int32, device=device)
        return self._run(tokens, position, torch.full_like(position, start), slots, torch.tensor(words, dtype=torch.int64, device=device), False, None)

    def _run(self, tokens: list[int], position: Tensor, prefix: Tensor, slots: Tensor, ancestors: Tensor | None, prefill: bool, features: dict[int, Tensor] | None) -> Tensor:
        model, count = self.model, len(tokens)
        page = self.table[0, (slots // self.page_size).long()].long()
        batch = RowBatch(token=torch.tensor(tokens, dtype=torch.int32, device=model.device), position=position, request=torch.zeros_like(position), prefix=prefix,
                         slot=page * self.page_size + slots % self.page_size, num_rows=rows(count, model.device), block_table=self.table, workspace=self.workspace,
                         ancestors=ancestors, prefill=prefill)
        hidden = model.forward(batch, self.pool, self.scratch, features)
        out = poisoned(count, model.config.vocab_size, dtype=torch.float32, device=model.device)
        model.logits(hidden, batch.num_rows, out)
        return out

    def prefill(self, tokens: list[int], features: dict[int, Tensor] | None = None) -> Tensor:
        return self.forward(tokens, 0, True, features)

    def decode(self, tokens: list[int]) -> Tensor:
        """Row by row, as plain decoding does."""
        return torch.cat([self.forward([t], i, False) for i, t in enumerate(tokens)])

"""Round: propose -> verify -> accept -> commit, for every active slot at once.

A chain is a tree with one branch; no speculation is a tree with one node: one code path. Everything between two rounds is in RoundState, on the
device; the host decides who is in, and reads what came out (result.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.draft.base import Drafter
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.dense import DenseModel
from specrt.round.prompt import PromptRows
from specrt.round.result import RoundResult, read_round, read_tree
from specrt.round.setup import SlotSetup
from specrt.round.state import RoundState


class Round:
    """config: EngineConfig (max_batch_size, max_model_len, page_size, num_pages, prefill_chunk, width, rejection_sample_method,
    synthetic_acceptance_length)."""

    def __init__(self, target: DenseModel, drafters: dict[str, Drafter], config: Any):
        self.target, self.drafters, self.config = target, drafters, config
        self.width: int = config.width
        self.slack = self.slack_of(self.width, drafters)
        device, batch = target.device, config.max_batch_size
        reach = config.max_model_len + 2 * self.slack
        max_pages = -(-reach // config.page_size)
        self.state = RoundState(batch, self.width, target.config.vocab_size, reach, max_pages, device)
        self.pool = KVPool(target.num_layers, config.num_pages, target.kv_heads, config.page_size, target.head_dim, target.dtype, device)
        s = self.state
        workspace = ops.attention_workspace(s.rows, target.config.num_heads, target.head_dim, max_pages * config.page_size, device)
        self.batch = RowBatch(token=s.row_token, position=s.row_position, request=s.row_request, prefix=s.row_prefix, slot=s.row_slot, num_rows=s.num_rows,
                              block_table=s.block_table, workspace=workspace, ancestors=s.row_ancestors)
        wanted = sorted({boundary for d in drafters.values() for boundary in d.features})
        hidden = target.config.hidden_size
        self.features = {j: torch.zeros(s.rows, hidden, dtype=target.dtype, device=device) for j in wanted}
        self.scratch = target.make_scratch(s.rows)
        self.prompt = PromptRows(target, self.pool, s, config.prefill_chunk, config.page_size, wanted)
        for drafter in drafters.values():
            drafter.bind(s, config.num_pages, config.page_size, config.prefill_chunk)
        self.setups: dict[int, SlotSetup] = {}
        self.running: set[int] = set()
        if config.rejection_sample_method == "standard":
            self.residual = torch.empty(batch, 2, s.vocab, dtype=torch.float32, device=device)

    @staticmethod
    def slack_of(width: int, drafters: dict[str, Drafter]) -> int:
        """Slots past the committed length that a slot's pages must cover before a round: the uncommitted rows, or a drafter's scratch."""
        return max([width] + [1 + d.scratch_slots for d in drafters.values()])

    # ---------------------------------------------------------------------------------------- slots (host)

    def admit(self, slot: int, setup: SlotSetup) -> None:
        s, p, tokens = self.state, setup.params, setup.tokens
        self.setups[slot] = setup
        s.active[slot] = 0
        s.seq_lens[slot] = 0
        s.history[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        s.seeds[slot] = setup.seed
        penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        bias = self._bias(p)
        s.sampling_f[slot] = torch.tensor([p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty])
        s.sampling_i[slot] = torch.tensor([p.top_k, p.min_tokens, setup.prompt_len, bias is not None, penalised], dtype=torch.int32)
        s.stop_ids[slot] = -1
        s.stop_ids[slot, : len(setup.stop_ids)] = torch.tensor(setup.stop_ids, dtype=torch.int32)
        if bias is not None:
            s.bias[slot] = bias
        prompt = torch.tensor(tokens[: setup.prompt_len], dtype=torch.int64)
        s.prompt_mask[slot] = torch.zeros(s.vocab, dtype=torch.uint8).index_fill_(0, prompt, 1)
        s.output_count[slot] = torch.bincount(torch.tensor(tokens[setup.prompt_len :], dtype=torch.int64), minlength=s.vocab).int()
        s.masked[slot] = 0
        for name, drafter in self.drafters.items():
            mine = name == setup.method
            drafter.admit(slot, setup.num_speculative_tokens if mine else 0, setup.max_depth if mine else 0)

    def set_pages(self, slot: int, pages: list[int]) -> None:
        self.state.block_table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def prefill(self, spans: list[tuple[int, int, int]], prompt_logprobs: dict[int, int] | None = None) -> dict:
        """Runs tokens[start:end] of each (slot, start, end) through the target and the slot's drafter; end <= len(tokens) - 1, lengths sum to at most prefill_chunk.

        prompt_logprobs {slot: n}: returns {slot: (logprob [len], top_token [len, n], top_logprob [len, n])} of the tokens start+1 .. end, as numpy."""
        batch, features = self.prompt.run(spans)
        for name, drafter in self.drafters.items():
            if any(self.setups[slot].method == name for slot, _, _ in spans):
                drafter.prefill(batch, self.prompt.span.end, features)
        return self.prompt.logprobs(spans, prompt_logprobs or {})

    def activate(self, slot: int) -> None:
        """The slot's prompt is in: it takes part in rounds from now on."""
        self.state.seq_lens[slot] = len(self.setups[slot].tokens) - 1
        self.state.active[slot] = 1
        self.running.add(slot)

    def release(self, slot: int) -> None:
        self.running.discard(slot)
        self.state.active[slot] = 0
        for drafter in self.drafters.values():
            drafter.admit(slot, 0, 0)
        del self.setups[slot]

    # ---------------------------------------------------------------------------------------- a round (device)

    def propose(self) -> None:
        s = self.state
        s.tree_token[:, :1] = s.history.gather(1, s.seq_lens[:, None].long())
        s.tree_size.copy_(s.active)
        for name, drafter in self.drafters.items():
            mine = [self.setups[slot] for slot in self.running if self.setups[slot].method == name and self.setups[slot].num_speculative_tokens > 0]
            if mine:
                drafter.propose(len(mine), max(setup.max_depth for setup in mine))
        s.tree_size.mul_(s.active)  # a slot still in prefill has a budget, but no round

    def verify(self) -> None:
        s = self.state
        capacity = row_bucket(sum(1 + self.setups[slot].num_speculative_tokens for slot in self.running), s.rows)
        ops.tree_build(s.tree_token, s.tree_parent, s.tree_size, s.seq_lens, s.block_table, self.config.page_size, s.tree_depth, s.tree_ancestors, s.row_offset,
                       s.row_request, s.row_node, s.row_token, s.row_position, s.row_prefix, s.row_slot, s.row_ancestors, s.num_rows)
        batch = self.batch.head(capacity)
        hidden = self.target.forward(batch, self.pool, self.scratch, {j: f[:capacity] for j, f in self.features.items()})
        self.z = s.logits[:capacity]
        self.target.logits(hidden, s.num_rows, self.z)
        masks = self._row_masks(capacity)
        ops.sample_transform(self.z, batch.request, batch.position, s.row_node[:capacity], s.tree_token, s.tree_ancestors, s.sampling_f, s.sampling_i, s.stop_ids, s.bias,
                             s.output_count, s.prompt_mask, s.mask_bits if masks is not None else None, masks, s.num_rows, s.row_status[:capacity])
        self._accept(batch)
        self._logprobs(capacity)
        ops.kv_commit(self.pool.k, self.pool.v, s.block_table, s.seq_lens, s.path, s.path_len)
        ops.round_advance(s.path_len, s.emitted, s.seq_lens, s.history, s.output_count)
        for name, drafter in self.drafters.items():
            if any(self.setups[slot].method == name for slot in self.running):
                drafter.extend(self.features)

    def _accept(self, batch: RowBatch) -> None:
        s, c = self.state, self.config
        if c.rejection_sample_method == "standard":
            q, q_levels = self._draft_logits()
            ops.accept_rejection(self.z, s.row_status[: batch.rows], s.row_offset, s.tree_token, s.tree_parent, s.tree_size, s.seq_lens, q, q_levels, s.seeds, s.sampling_f,
                                 self.residual, s.path, s.path_len, s.emitted, s.error)
            return
        target, status = s.row_target[: batch.rows], s.row_status[: batch.rows]
        ops.sample_exact(self.z, batch.request, batch.position, s.seeds, s.sampling_f, s.num_rows, target)
        if c.rejection_sample_method == "synthetic":
            ops.accept_synthetic(s.tree_token, s.tree_parent, s.tree_size, s.row_offset, target, status, s.seq_lens, s.seeds, c.synthetic_acceptance_length, s.path, s.path_len,
                                 s.emitted, s.error)
        else:
            ops.accept_walk(s.tree_token, s.tree_parent, s.tree_size, s.row_offset, target, status, s.path, s.path_len, s.emitted, s.error)

    def _draft_logits(self) -> tuple[Tensor, Tensor]:
        for drafter in self.drafters.values():
            stored = drafter.draft_logits()
            if stored is not None:
                return stored
        s = self.state
        if not hasattr(self, "no_q"):
            self.no_q = torch.zeros(s.batch, 1, s.vocab, dtype=torch.float32, device=s.device), torch.zeros_like(s.seq_lens)
        return self.no_q

    # ---------------------------------------------------------------------------------------- logprobs, masks

    def _logprobs(self, capacity: int) -> None:
        """Log-probabilities of the emitted tokens, at the rows that chose them (row row_offset[b] + path[b, i] chose emitted[b, i])."""
        wanted = [self.setups[slot].params.logprobs for slot in self.running if self.setups[slot].params.logprobs is not None]
        self.row_logprobs: tuple[Tensor, Tensor, Tensor] | None = None
        if not wanted:
            return
        s = self.state
        device, top = s.device, max(wanted)
        # Rows that emitted nothing ask about token 0; entries past path_len go to a bin behind the last row.
        used = torch.arange(s.nodes, device=device)[None] < s.path_len[:, None]
        row = torch.where(used, s.row_offset[:-1, None] + s.path, capacity).long()
        token = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        token.scatter_(0, row.flatten(), s.emitted.flatten())
        f32 = dict(dtype=torch.float32, device=device)
        lse, chosen = torch.empty(capacity, **f32), torch.empty(capacity, **f32)
        top_token, top_logprob = torch.empty(capacity, top, dtype=torch.int32, device=device), torch.empty(capacity, top, **f32)
        ops.row_logprobs(self.z, token[:capacity], s.num_rows, lse, chosen, top_token, top_logprob)
        self.row_logprobs = chosen, top_token, top_logprob

    def set_node_masks(self, slot: int, masks: np.ndarray) -> None:
        """masks bool [nodes, V] of the slot's tree nodes (True: the token may follow the node)."""
        s = self.state
        words = -(-s.vocab // 32)
        if s.mask_bits is None:
            s.mask_bits = torch.zeros(s.rows, words, dtype=torch.int32, device=s.device)
        padded = np.zeros((masks.shape[0], words * 32), dtype=bool)
        padded[:, : s.vocab] = masks
        bits = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
        s.mask_bits[slot * s.nodes : slot * s.nodes + masks.shape[0]] = torch.from_numpy(bits)
        s.masked[slot] = 1

    def _row_masks(self, capacity: int) -> Tensor | None:
        s = self.state
        if not any(self.setups[slot].params.token_mask is not None for slot in self.running):
            return None
        request = s.row_request[:capacity].long()
        return torch.where(s.masked[request] > 0, s.row_request[:capacity] * s.nodes + s.row_node[:capacity], -1).int()

    def _bias(self, p: Any) -> Tensor | None:
        if p.logit_bias is None and p.allowed_token_ids is None:
            return None
        bias = torch.zeros(self.state.vocab)
        if p.allowed_token_ids is not None:
            bias.fill_(float("-inf"))
            bias[torch.tensor(list(p.allowed_token_ids), dtype=torch.int64)] = 0.0
        for token, value in (p.logit_bias or {}).items():
            bias[token] += value
        return bias

    # ---------------------------------------------------------------------------------------- what the host reads

    def tree(self, slot: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the slot's proposed tree (a host read: only for requests whose masks the host decides)."""
        return read_tree(self.state, slot)

    def result(self) -> RoundResult:
        return read_round(self.state, self.row_logprobs)

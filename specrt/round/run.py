"""Round: propose -> verify -> accept -> commit, for every active slot at once.

A chain is a tree with one branch; no speculation is a tree with one node: one code path. Everything between two rounds is in RoundState, on the device; on CUDA a
round is one graph launch. The host decides who is in, and reads what came out (result.py), there a round late: what it writes is ordered behind the rounds it has
launched, so a slot whose request has ended may be released, and its pages given away, while a round still runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.draft.base import Drafter
from specrt.layers.batch import RowBatch, row_bucket
from specrt.models.dense import DenseModel
from specrt.round.admission import pack_masks, upload, write_slot
from specrt.round.graph import RoundGraphs, RoundShape
from specrt.round.prompt import PromptRows
from specrt.round.result import PendingResult, ResultRing, read_tree
from specrt.round.setup import SlotSetup
from specrt.round.state import LogprobRows, RoundState


#: Rows of which lm_head chooses the tokens itself, greedily and at temperature > 0, where it makes every token's noise and the sampler only what may win: of more it takes longer than
#: logits and the sampler (H100, 128256 x 4096, us against theirs: greedy 160 rows 404, 435, 256 rows 545, 502; drawn 128 rows 437, 452, 160 rows 487, 478; with logprobs 64 rows 388, 500, so those always).
MOST_CHOSEN_ROWS, MOST_DRAWN_ROWS = 160, 128


class Round:
    """config: EngineConfig (max_batch_size, max_model_len, page_size, num_pages, prefill_chunk, width, rejection_sample_method,
    synthetic_acceptance_length, enforce_eager)."""

    def __init__(self, target: DenseModel, drafters: dict[str, Drafter], config: Any):
        self.target, self.drafters, self.config = target, drafters, config
        self.width: int = config.width
        self.slack = self.slack_of(self.width, drafters)
        device, batch = target.device, config.max_batch_size
        reach = config.max_model_len + 2 * self.slack
        max_pages = -(-reach // config.page_size)
        self.state = RoundState(batch, self.width, target.config.vocab_size, reach, max_pages, device)
        self.pool = KVPool(target.num_layers, config.num_pages, target.kv_heads, config.page_size, target.head_dim, target.kv_dtype, device, target.kv_scales)
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
            drafter.lend(self.pool)
            drafter.bind(s, config.num_pages, config.page_size, config.prefill_chunk)
        self.setups: dict[int, SlotSetup] = {}
        self.running: set[int] = set()
        self.graphs = RoundGraphs(device, enabled=device.type == "cuda" and not config.enforce_eager)
        self.ring = ResultRing(s)
        #: Rounds that may be launched before the oldest of them is read. On the CPU a round has run when it is launched, so waiting would gain nothing.
        self.lookahead = 1 if device.type == "cuda" else 0
        self._shape: RoundShape | None = None  # of the slots that run now
        self._logprob_rows: dict[tuple[int, int], LogprobRows] = {}
        if config.rejection_sample_method == "standard":
            self.residual = torch.empty(batch, 2, s.vocab, dtype=torch.float32, device=device)
            # For slots whose drafts are a point mass, or that have none.
            self.no_q = torch.zeros(batch, 1, s.vocab, dtype=torch.float32, device=device), torch.zeros_like(s.seq_lens)

    @staticmethod
    def slack_of(width: int, drafters: dict[str, Drafter]) -> int:
        """Slots past the committed length that a slot's pages must cover before a round: the uncommitted rows, or a drafter's scratch."""
        return max([width] + [1 + d.scratch_slots for d in drafters.values()])

    # ---------------------------------------------------------------------------------------- slots (host)

    def admit(self, slot: int, setup: SlotSetup) -> None:
        self.setups[slot] = setup
        write_slot(self.state, slot, setup)
        for name, drafter in self.drafters.items():
            mine = name == setup.method
            drafter.admit(slot, setup.num_speculative_tokens if mine else 0, setup.max_depth if mine else 0)

    def set_pages(self, slot: int, pages: list[int]) -> None:
        self.state.block_table[slot, : len(pages)].copy_(upload(np.array(pages, dtype=np.int32), self.state.device))

    def prefill(self, spans: list[tuple[int, int, int]], prompt_logprobs: dict[int, int] | None = None) -> dict:
        """Runs tokens[start:end] of each (slot, start, end) through the target and the slot's drafter; end <= len(tokens) - 1, lengths sum to at most prefill_chunk.

        prompt_logprobs {slot: n}: returns {slot: (logprob [len], top_token [len, n], top_logprob [len, n])} of the tokens start+1 .. end, as numpy."""
        rows = self.prompt.place(spans)
        names = tuple(name for name in self.drafters if any(self.setups[slot].method == name for slot, _, _ in spans))

        def forward() -> None:
            batch, features = self.prompt.forward(rows)
            for name in names:
                self.drafters[name].prefill(batch, self.prompt.span.end, features)

        self.graphs.run(("prefill", rows, names), forward)
        return self.prompt.logprobs(spans, rows, prompt_logprobs or {})

    def activate(self, slot: int) -> None:
        """The slot's prompt is in: it takes part in rounds from now on."""
        s, tokens = self.state, self.setups[slot].tokens
        s.seq_lens[slot].fill_(len(tokens) - 1)
        s.tree_token[slot, 0].fill_(tokens[-1])
        s.tree_size[slot].fill_(1)
        s.active[slot].fill_(1)
        self.running.add(slot)
        self._shape = None

    def release(self, slot: int) -> None:
        self.running.discard(slot)
        self._shape = None
        self.state.active[slot].fill_(0)
        for drafter in self.drafters.values():
            drafter.admit(slot, 0, 0)
        del self.setups[slot]

    # ---------------------------------------------------------------------------------------- a round

    def launch(self, decide: Callable[[], None] | None = None) -> PendingResult:
        """Enqueues a round of the active slots. decide: called between the proposal and the verification, for slots whose token masks the host must find out
        (tree, set_node_masks): such a round is two graphs, and waits for the device between them."""
        shape = self._shape = self._shape or self.shape()
        captured = all(self.drafters[name].captured for name, _, _ in shape.drafts)
        if captured and decide is None:
            self.graphs.run(shape, lambda: self._run(shape))
        else:
            if captured:
                self.graphs.run(("propose", shape), lambda: self.propose(shape))
            else:
                self.propose(shape)
            if decide is not None:
                decide()
            self.graphs.run(("verify", shape), lambda: self._after_proposal(shape))
        return self.ring.push(self._logprobs_of(shape))

    def shape(self) -> RoundShape:
        """Of a round of the slots that run now."""
        setups = [self.setups[slot] for slot in self.running]
        drafts = []
        for name in self.drafters:
            mine = [setup for setup in setups if setup.method == name and setup.num_speculative_tokens > 0]
            if mine:
                drafts.append((name, row_bucket(len(mine), self.state.batch), max(setup.max_depth for setup in mine)))
        top = max((setup.params.logprobs for setup in setups if setup.params.logprobs is not None), default=None)
        rows = row_bucket(sum(1 + setup.num_speculative_tokens for setup in setups), self.state.rows)
        return RoundShape(rows=rows, drafts=tuple(drafts), logprobs=top if not top else row_bucket(top, self.state.vocab),
                          masked=any(setup.params.token_mask is not None for setup in setups), logits=self._needs_logits(setups, rows, top is not None))

    def _needs_logits(self, setups: list[SlotSetup], rows: int, logprobs: bool) -> bool:
        method = self.config.rejection_sample_method
        # Synthetic acceptance emits tokens that their rows did not choose; the ratio test looks at whole distributions.
        if not self.target.samples or method == "standard" or (method == "synthetic" and logprobs) or any(setup.needs_logits for setup in setups):
            return True
        drawn = any(setup.params.temperature > 0 for setup in setups)
        return rows > (MOST_DRAWN_ROWS if drawn else MOST_CHOSEN_ROWS) and not logprobs

    def _run(self, shape: RoundShape) -> None:
        self.propose(shape)
        self._after_proposal(shape)

    def _after_proposal(self, shape: RoundShape) -> None:
        self.verify(shape)
        self.accept(shape)
        self.commit(shape)

    # The phases: device only, in a graph from the second round of a shape on.

    def propose(self, shape: RoundShape) -> None:
        for name, slots, depth in shape.drafts:
            self.drafters[name].propose(slots, depth)

    def verify(self, shape: RoundShape) -> None:
        s = self.state
        ops.tree_build(s.tree_token, s.tree_parent, s.active, s.tree_size, s.seq_lens, s.block_table, self.config.page_size, s.tree_depth, s.tree_ancestors, s.row_offset,
                       s.row_request, s.row_node, s.row_token, s.row_position, s.row_prefix, s.row_slot, s.row_ancestors, s.num_rows)
        rows, batch = shape.rows, self.batch.head(shape.rows)
        hidden = self.target.forward(batch, self.pool, self.scratch, {j: f[:rows] for j, f in self.features.items()})
        if shape.logits:
            self.target.logits(hidden, s.num_rows, s.logits[:rows])
        else:
            logprobs = self._logprobs_of(shape)
            self.target.sample(hidden, batch, s.seeds, s.sampling_f, s.row_target[:rows], s.row_status[:rows], None if logprobs is None else logprobs.chosen)

    def accept(self, shape: RoundShape) -> None:
        s, c, rows = self.state, self.config, shape.rows
        z, request, position, status, target = s.logits[:rows], s.row_request[:rows], s.row_position[:rows], s.row_status[:rows], s.row_target[:rows]
        mask_bits, row_mask = (s.mask_bits, self._row_mask(rows)) if shape.masked else (None, None)
        standard = c.rejection_sample_method == "standard"
        if shape.logits:
            choice = {} if standard else dict(seeds=s.seeds, token=target, keep=shape.logprobs is not None)  # the choice is made while the row is at hand
            ops.sample_transform(z, request, position, s.row_node[:rows], s.tree_token, s.tree_ancestors, s.sampling_f, s.sampling_i, s.stop_ids, s.bias,
                                 s.output_count, s.prompt_mask, mask_bits, row_mask, s.num_rows, status, **choice)
        if standard:
            q, q_levels = self._draft_logits()
            ops.accept_rejection(z, status, s.row_offset, s.tree_token, s.tree_parent, s.tree_size, s.seq_lens, q, q_levels, s.seeds, s.sampling_f, self.residual,
                                 s.path, s.path_len, s.emitted, s.error)
        elif c.rejection_sample_method == "synthetic":
            ops.accept_synthetic(s.tree_token, s.tree_parent, s.tree_size, s.row_offset, target, status, s.seq_lens, s.seeds, c.synthetic_acceptance_length, s.path,
                                 s.path_len, s.emitted, s.error)
        else:
            ops.accept_walk(s.tree_token, s.tree_parent, s.tree_size, s.row_offset, target, status, s.path, s.path_len, s.emitted, s.error)
        if shape.logits and shape.logprobs is not None:
            self._row_logprobs(z, self._logprobs_of(shape))

    def commit(self, shape: RoundShape) -> None:
        s = self.state
        ops.kv_commit(self.pool.k, self.pool.v, s.block_table, s.seq_lens, s.path, s.path_len)
        # The host will learn a round late that a request is over: a slot at its limit stops by itself, before it grows past its pages.
        ops.round_advance(s.path_len, s.emitted, s.limit, s.seq_lens, s.history, s.output_count, s.active, s.tree_token)
        for name, slots, depth in shape.drafts:
            self.drafters[name].extend(self.features, slots, depth)

    def _draft_logits(self) -> tuple[Tensor, Tensor]:
        return next((stored for drafter in self.drafters.values() if (stored := drafter.draft_logits()) is not None), self.no_q)

    # ---------------------------------------------------------------------------------------- logprobs, masks

    def _logprobs_of(self, shape: RoundShape) -> LogprobRows | None:
        """The buffers for a round's log-probabilities: made before a graph needs them, read behind it."""
        if shape.logprobs is None:
            return None
        key = shape.rows, shape.logprobs
        if key not in self._logprob_rows:
            self._logprob_rows[key] = LogprobRows(*key, self.state.device)
        return self._logprob_rows[key]

    def _row_logprobs(self, z: Tensor, out: LogprobRows) -> None:
        """Of the emitted tokens, at the rows that chose them (row row_offset[b] + path[b, i] chose emitted[b, i])."""
        s = self.state
        # Rows that emitted nothing ask about token 0; entries past path_len go to a bin behind the last row.
        unused = torch.arange(s.nodes, device=s.device)[None] >= s.path_len[:, None]
        row = (s.row_offset[:-1, None] + s.path).masked_fill_(unused, out.rows).long()
        token = torch.zeros(out.rows + 1, dtype=torch.int32, device=s.device)
        token.scatter_(0, row.flatten(), s.emitted.flatten())
        lse = torch.empty(out.rows, dtype=torch.float32, device=s.device)
        ops.row_logprobs(z, token[: out.rows], s.num_rows, lse, out.chosen, out.top_token, out.top_logprob)

    def tree(self, slot: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the slot's proposed tree; waits for the device (``launch``'s decide)."""
        return read_tree(self.state, slot)

    def set_node_masks(self, slot: int, masks: np.ndarray) -> None:
        """masks bool [nodes, V] of the slot's tree nodes (True: the token may follow the node)."""
        s, first = self.state, slot * self.state.nodes
        s.mask_bits[first : first + masks.shape[0]].copy_(upload(pack_masks(masks), s.device))

    def _row_mask(self, rows: int) -> Tensor:
        s, request = self.state, self.state.row_request[:rows]
        return (request * s.nodes + s.row_node[:rows]).masked_fill_(s.masked[request.long()] == 0, -1)

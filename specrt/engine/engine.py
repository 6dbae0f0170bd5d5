"""Engine: requests in, rounds launched, outputs out. No tensor maths: the round does that.

A step: pages for the running -> requests enter -> a prompt chunk -> a round is launched -> the round before it is read, and every request's new tokens are cut
where its output ends. So the device always has its next round while the host works, and the host learns a round late that a request is over: the
round that was launched meanwhile does no harm (a slot stops at its longest length by itself) and what it says of that request is dropped. On the CPU the round
just launched is read. Not thread-safe: LLM calls it in turn (turns.py)."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from specrt.checks import integer
from specrt.config import EngineConfig
from specrt.engine.masks import node_masks
from specrt.engine.output import StreamPiece
from specrt.engine.request import Request
from specrt.engine.scheduler import Scheduler
from specrt.engine.speculation import resolve
from specrt.engine.statistics import EngineTotals
from specrt.engine.stops import OutputText
from specrt.round.setup import SlotSetup
from specrt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from specrt.round.result import PendingResult, RoundResult
    from specrt.round.run import Round
    from specrt.text.tokenizer import Tokenizer

MAX_STOP_IDS = 64  # round.state.STOP_IDS
_ROUND_ERRORS = {
    1: "the logits for output token {index} are not finite (NaN or infinity)",
    2: "no token is left to choose for output token {index}: allowed_token_ids, logit_bias, min_tokens or token_mask leave none",
}

Event = tuple[Request, StreamPiece]


@dataclass
class _InFlight:
    """A round that was launched and not read yet."""

    pending: PendingResult
    requests: list[Request]
    failed: dict[Request, str] = field(default_factory=dict)  # requests that end with this error after the round


class Engine:
    """round: made with ``config`` (its slack and pages are what the scheduler plans with). tokenizer: None if the model has none (outputs then have no text).
    eos_token_ids: end an output unless ignore_eos."""

    def __init__(self, round: Round, tokenizer: Tokenizer | None, config: EngineConfig, vocab_size: int, eos_token_ids: tuple[int, ...]):
        self.round, self.tokenizer, self.config, self.vocab_size, self.eos_token_ids = round, tokenizer, config, vocab_size, tuple(eos_token_ids)
        self.scheduler = Scheduler(config.max_batch_size, config.num_pages, config.page_size, round.slack, 2 * round.width)
        self.totals = EngineTotals()
        self._in_flight: _InFlight | None = None

    # ---------------------------------------------------------------------------------------- requests

    def prepare(self, prompt: list[int], params: SamplingParams, seed: int) -> Request:
        """A request for one sample, checked against the model and the engine, that is not taken yet. ValueError says what is wrong."""
        tokens = self._check_prompt(prompt)
        params.check_vocabulary(self.vocab_size)
        speculation = resolve(params.speculative, self.config)
        end_ids = tuple(dict.fromkeys((() if params.ignore_eos else self.eos_token_ids) + params.stop_token_ids))
        if len(end_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids: {len(end_ids)} ids end the output (the model's own included); at most {MAX_STOP_IDS} may")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop = {params.stop!r} needs a tokenizer, which this checkpoint has not; use stop_token_ids")
        if params.token_mask is not None and self.config.rejection_sample_method == "synthetic":
            raise ValueError("token_mask does not go with rejection_sample_method 'synthetic', which accepts drafts that a mask forbids; use 'exact' or 'standard'")
        text = OutputText(self.tokenizer.detokenizer() if self.tokenizer is not None else None, params.stop)
        request = Request(tokens, params, seed, speculation, end_ids, text, self.config.max_model_len, self.config.rejection_sample_method)
        needed, there = self.scheduler.most_pages(request), self.scheduler.allocator.num_pages
        if needed > there:
            raise ValueError(f"the KV cache is too small: {len(tokens)} prompt tokens with max_tokens = {params.max_tokens} may need {needed} pages of "
                             f"{self.config.page_size} positions, there are {there}; lower max_tokens, shorten the prompt or raise kv_cache_memory")
        return request

    def add(self, request: Request) -> None:
        self.totals.prompt_tokens += len(request.prompt)
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Frees the request's slot and pages; nothing if it has ended."""
        if request.finish_reason is None:
            self._release(request, "abort", None)

    def metrics(self) -> dict[str, Any]:
        """Totals since the start, and what is going on now."""
        allocator = self.scheduler.allocator
        return self.totals.metrics() | {
            "specrt:num_requests_running": len(self.scheduler.running),
            "specrt:num_requests_waiting": len(self.scheduler.waiting),
            "specrt:kv_cache_usage": 1.0 - allocator.num_free / allocator.num_pages,
        }

    # ---------------------------------------------------------------------------------------- a step

    def step(self) -> list[Event]:
        """One prompt chunk and one round. Returns what each request got, and ends.

        An exception out of the round (the device failed, or Ctrl-C) leaves its state unknown: every request in a slot ends with an error, and it passes on."""
        try:
            events = self._schedule()
            self._prefill()
            return events + self._round()
        except BaseException as error:
            self._in_flight = None
            for request in self.scheduler.running:
                with suppress(Exception):  # a device that failed may fail again; the host's side is freed first
                    self._release(request, "error", f"the engine failed: {type(error).__name__}: {error}")
            raise

    def _schedule(self) -> list[Event]:
        events: list[Event] = []
        # The host catches up before it puts anybody back, as the round in flight may end somebody, and before it decides masks, which need the whole output.
        if self._in_flight is not None and (any(r.params.token_mask is not None for r in self.scheduler.running) or not self._reserve(may_put_back=False)):
            events = self._collect()
        if self._in_flight is None:
            self._reserve(may_put_back=True)
        for request in self.scheduler.admit():
            try:
                self._enter(request)
            except Exception as error:  # all that was written is the slot's own; a device that failed refuses the release too, which ends everyone (step)
                events.append(self._fail(request, f"the request could not enter its slot: {type(error).__name__}: {error}"))
        return events

    def _enter(self, request: Request) -> None:
        wanted = request.speculation
        self.round.admit(request.slot, SlotSetup(
            tokens=request.prompt + request.output, prompt_len=len(request.prompt), seed=request.seed, params=request.params, stop_ids=request.end_ids,
            method=wanted.method, num_speculative_tokens=wanted.num_speculative_tokens, max_depth=wanted.max_depth, longest=request.longest))
        self.round.set_pages(request.slot, request.pages)

    def _reserve(self, may_put_back: bool) -> bool:
        """Pages for the next round; False if that needs somebody to be put back."""
        grown, put_back, covered = self.scheduler.reserve(may_put_back)
        for slot, request in put_back:
            request.stats.num_preemptions += 1
            self.totals.preemptions += 1
            self.round.release(slot)
        for request in grown:
            self.round.set_pages(request.slot, request.pages)
        return covered

    def _prefill(self) -> None:
        spans = self.scheduler.prompt_spans(self.config.prefill_chunk)
        wanted = {r.slot: r.params.prompt_logprobs for r, _, _ in spans if r.wants_prompt_logprobs}
        if spans:
            found = self.round.prefill([(r.slot, start, end) for r, start, end in spans], wanted)
        for request, start, end in spans:
            request.prefilled = end
            if request.slot in wanted:
                following = (request.prompt + request.output)[start + 1 : end + 1]
                request.prompt_logprobs += [_top(token, *row, wanted[request.slot]) for token, *row in zip(following, *found[request.slot])]
        for request in self.scheduler.running:
            if not request.active and request.prefilled == request.committed:
                self.round.activate(request.slot)
                request.active = True

    def _round(self) -> list[Event]:
        """Launches a round, and reads the one before it."""
        launched = None
        active = [request for request in self.scheduler.running if request.active and not request.ends_in_flight]
        if active:
            failed: dict[Request, str] = {}
            masked = any(request.params.token_mask is not None for request in active)
            pending = self.round.launch((lambda: failed.update(self._set_masks(active))) if masked else None)
            launched = _InFlight(pending, active, failed)
        events = self._collect()
        alive = [request for request in active if request.finish_reason is None]
        self._in_flight = launched if alive else None
        for request in alive:
            request.in_flight = 1 + request.speculation.max_depth
        if self.round.lookahead == 0:
            events += self._collect()
        return events

    def _collect(self) -> list[Event]:
        """Reads the round in flight, if there is one."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return []
        for request in in_flight.requests:
            request.in_flight = 0
        alive = [request for request in in_flight.requests if request.finish_reason is None]
        if not alive:
            return []
        result = in_flight.pending.read()
        now = time.perf_counter()
        return [self._fail(request, in_flight.failed[request]) if request in in_flight.failed else self._advance(request, result, now) for request in alive]

    def _set_masks(self, active: list[Request]) -> dict[Request, str]:
        """Node masks of the requests that have a callable. One that raises ends its own request only, after the round."""
        failed: dict[Request, str] = {}
        for request in active:
            if request.params.token_mask is None:
                continue
            tokens, parents = self.round.tree(request.slot)
            try:
                masks = node_masks(request, tokens, parents, self.vocab_size)
            except Exception as error:
                failed[request] = f"token_mask failed at output token {len(request.output)}: {type(error).__name__}: {error}"
                masks = np.ones((len(tokens), self.vocab_size), dtype=bool)
            self.round.set_node_masks(request.slot, masks)
        return failed

    def _advance(self, request: Request, result: RoundResult, now: float) -> Event:
        """Takes a request's tokens of a round, up to its end."""
        slot, status = request.slot, int(result.error[request.slot])
        emitted = result.emitted[slot, : result.path_len[slot]].tolist()
        accepted = max(len(emitted) - (status == 0), 0)  # the last is the target's own; a walk that ended in an error has none
        taken, reason = 0, None
        for token in emitted:
            reason = request.add_token(token, taken < accepted, self._logprobs(request, result, taken))
            taken += 1
            if reason is not None:
                break
        depths = result.tree_depth[slot, 1 : result.tree_size[slot]].tolist()
        for counts in (request.stats, self.totals):
            counts.add_round(depths, min(taken, accepted))
        self.totals.generation_tokens += taken
        if taken:
            request.first_token, request.last_token = request.first_token or now, now
        if reason is None and status != 0:
            index = len(request.output)
            return self._fail(request, _ROUND_ERRORS.get(status, f"the round failed with status {status} at output token {{index}}").format(index=index), taken)
        if reason is not None:
            self._release(request, reason, None)
        return self._event(request, taken)

    def _fail(self, request: Request, error: str, taken: int = 0) -> Event:
        self._release(request, "error", error)
        return self._event(request, taken)

    def _release(self, request: Request, reason: str, error: str | None) -> None:
        slot = request.slot
        self.scheduler.remove(request)
        request.finish_reason, request.error = reason, error
        request.text.finish()
        self.totals.finished[reason] += 1
        if slot is not None:
            self.round.release(slot)

    # ---------------------------------------------------------------------------------------- small things

    def _event(self, request: Request, taken: int) -> Event:
        tail = slice(len(request.output) - taken, None)
        done = request.finish_reason is not None
        return request, StreamPiece(text=request.text.take(), token_ids=request.output[tail], drafted=request.drafted[tail], finish_reason=request.finish_reason,
                                    error=request.error, output=request.to_output() if done else None)

    def _logprobs(self, request: Request, result: RoundResult, i: int) -> dict[int, float] | None:
        n = request.params.logprobs
        if n is None:
            return None
        slot = request.slot
        return _top(int(result.emitted[slot, i]), result.chosen[slot, i], result.top_token[slot, i], result.top_logprob[slot, i], n)

    def _check_prompt(self, prompt: list[int]) -> list[int]:
        if not prompt:
            raise ValueError("the prompt is empty; it must have at least one token")
        tokens = [integer("prompt token id", token, 0, self.vocab_size - 1) for token in prompt]
        if len(tokens) > self.config.max_model_len - 1:
            raise ValueError(f"the prompt has {len(tokens)} tokens; with max_model_len = {self.config.max_model_len} it may have at most {self.config.max_model_len - 1}")
        return tokens


def _top(token: int, logprob: Any, top_token: Any, top_logprob: Any, n: int) -> dict[int, float]:
    """{token: log-probability}: the chosen one first, then the n best in order (fewer where fewer are possible)."""
    found = {token: float(logprob)}
    for other, value in zip(top_token[:n].tolist(), top_logprob[:n].tolist()):
        if other >= 0:
            found.setdefault(other, value)
    return found

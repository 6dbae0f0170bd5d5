"""Request: one sample being generated, from arrival to its end."""

from __future__ import annotations

import time

from specrt.engine.output import RequestOutput
from specrt.engine.speculation import Speculation
from specrt.engine.statistics import RequestStats
from specrt.engine.stops import OutputText
from specrt.sampling_params import SamplingParams


class Request:
    """``number`` orders requests by arrival (set when the engine takes it). In a slot: ``slot``, ``pages``, ``prefilled`` (tokens whose KV is written),
    ``active`` (takes part in rounds), ``in_flight`` (most tokens that a round may add which the host has not read yet). ``tokens`` = prompt + output; the last
    one is the root of the next round, all before it are committed."""

    def __init__(self, prompt: list[int], params: SamplingParams, seed: int, speculation: Speculation, end_ids: tuple[int, ...], text: OutputText,
                 max_model_len: int, rejection_sample_method: str = "exact"):
        self.prompt, self.params, self.seed, self.speculation, self.end_ids = prompt, params, seed, speculation, end_ids
        self.max_tokens = min(params.max_tokens, max_model_len - len(prompt))
        self.text = text
        self.number = -1
        self.slot: int | None = None
        self.pages: list[int] = []
        self.prefilled = 0
        self.active = False
        self.in_flight = 0

        self.output: list[int] = []
        self.drafted: list[bool] = []
        self.logprobs: list[dict[int, float]] = []
        self.prompt_logprobs: list[dict[int, float] | None] = [None]
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.arrival = time.perf_counter()  # so that all waiting counts, the one for a turn to enter too
        self.first_token = self.last_token = 0.0
        self.stats = RequestStats(method=speculation.method, rejection_sample_method=rejection_sample_method, num_prompt_tokens=len(prompt))

    @property
    def committed(self) -> int:
        """Tokens before the root of the next round, as far as the host has read."""
        return len(self.prompt) + len(self.output) - 1

    @property
    def ends_in_flight(self) -> bool:
        """Whether the round that is not read yet is its last for certain."""
        return self.in_flight > 0 and len(self.output) + 1 >= self.max_tokens

    @property
    def longest(self) -> int:
        """Most tokens that prompt and output can have together."""
        return len(self.prompt) + self.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    def leave_slot(self) -> None:
        """Put back or done. What was generated stays; prompt logprobs that are not complete are computed anew."""
        self.slot, self.pages, self.prefilled, self.active, self.in_flight = None, [], 0, False, 0
        if self.wants_prompt_logprobs:
            self.prompt_logprobs = [None]

    def ends_with(self, token: int, index: int) -> bool:
        """Whether ``token`` as output token ``index`` ends the output by its id."""
        return index >= self.params.min_tokens and token in self.end_ids

    def add_token(self, token: int, drafted: bool, logprobs: dict[int, float] | None) -> str | None:
        """Appends an output token; the reason if it is the last."""
        index = len(self.output)
        self.output.append(token)
        self.drafted.append(drafted)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self.ends_with(token, index) or self.text.push(token, index >= self.params.min_tokens):
            return "stop"
        return "length" if len(self.output) >= self.max_tokens else None

    def to_output(self) -> RequestOutput:
        self.stats.num_output_tokens = len(self.output)
        if self.output:
            self.stats.time_to_first_token = self.first_token - self.arrival
            self.stats.decode_time = self.last_token - self.first_token
        output = RequestOutput(
            text=self.text.text, token_ids=self.output, prompt_token_ids=self.prompt, finish_reason=self.finish_reason, error=self.error, seed=self.seed,
            logprobs=None if self.params.logprobs is None else self.logprobs,
            prompt_logprobs=None if self.params.prompt_logprobs is None else self.prompt_logprobs, drafted=self.drafted, stats=self.stats)
        output.samples = [output]
        return output

"""FakeRound: a deterministic pseudo-model behind the interface of round.Round, which checks what the engine does to it; and a tokenizer of letters."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import numpy as np

from specrt.config import EngineConfig
from specrt.engine.engine import Engine
from specrt.round.setup import SlotSetup
from specrt.sampling_params import SamplingParams

VOCAB = 64
EOS = 0


def next_token(seed: int, tokens: list[int]) -> int:
    """The pseudo-model: never EOS (0)."""
    return 1 + zlib.crc32(repr((seed, tokens)).encode()) % (VOCAB - 1)


def reference(seed: int, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(seed, tokens))
    return tokens[len(prompt) :]


def logprob(token: int, position: int) -> float:
    return -float(token) - position / 1000


class FakeRound:
    """KV is simulated: each page remembers the token at each of its offsets, and verify reads the whole prefix back through the block table. Drafts: a chain right
    up to a depth that varies, plus wrong siblings, within the request's budget. ``script``: {(tokens so far): next token} overrides the model.
    ``errors``: {number of tokens known: status}. ``lookahead``: rounds the engine may launch before it reads the oldest; a slot stops at its longest length by itself."""

    lookahead = 0

    def __init__(self, config: EngineConfig, width: int = 9, slack: int = 12):
        self.config, self.width, self.slack = config, width, slack
        self.kv: dict[tuple[int, int], int] = {}
        self.setups: dict[int, SlotSetup] = {}
        self.pages: dict[int, list[int]] = {}
        self.history: dict[int, list[int]] = {}
        self.filled: dict[int, int] = {}
        self.running: set[int] = set()
        self.masks: dict[int, np.ndarray] = {}
        self.script: dict[tuple[int, ...], int] = {}
        self.errors: dict[int, int] = {}
        self.explode = False
        self.rounds = 0
        self.read = 0  # number of the last round that was read
        self.trees: dict[int, tuple[list[int], list[int]]] = {}
        self.spans: list[list[tuple[int, int, int]]] = []

    # slots

    def admit(self, slot: int, setup: SlotSetup) -> None:
        assert slot not in self.setups, "a slot must be released before it is admitted to again"
        assert 0 <= slot < self.config.max_batch_size
        self.setups[slot], self.history[slot], self.filled[slot] = setup, list(setup.tokens), 0
        self.pages[slot] = []

    def set_pages(self, slot: int, pages: list[int]) -> None:
        others = {p for s, ps in self.pages.items() if s != slot for p in ps}
        assert len(set(pages)) == len(pages) and not others & set(pages), "a page belongs to two requests"
        assert all(0 <= p < self.config.num_pages for p in pages)
        assert pages[: len(self.pages[slot])] == self.pages[slot], "growing must keep the pages a request has"
        assert len(pages) <= -(-(self.config.max_model_len + 2 * self.slack) // self.config.page_size)
        self.pages[slot] = list(pages)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.pages[slot][position // self.config.page_size], position % self.config.page_size

    def prefill(self, spans, prompt_logprobs=None):
        assert 0 < sum(end - start for _, start, end in spans) <= self.config.prefill_chunk
        self.spans.append(list(spans))
        found = {}
        for slot, start, end in spans:
            tokens = self.setups[slot].tokens
            assert slot not in self.running and start == self.filled[slot] and start < end <= len(tokens) - 1
            for position in range(start, end):
                self.kv[self._place(slot, position)] = tokens[position]
            self.filled[slot] = end
            if slot in (prompt_logprobs or {}):
                n = prompt_logprobs[slot]
                top = np.tile(np.arange(n, dtype=np.int32), (end - start, 1))
                found[slot] = (np.array([logprob(tokens[p + 1], p + 1) for p in range(start, end)], dtype=np.float32), top, -top.astype(np.float32))
        return found

    def activate(self, slot: int) -> None:
        assert self.filled[slot] == len(self.setups[slot].tokens) - 1
        self.running.add(slot)

    def release(self, slot: int) -> None:
        self.running.discard(slot)
        del self.setups[slot], self.history[slot], self.filled[slot], self.pages[slot]

    # a round

    def launch(self, decide=None):
        self.masks.clear()
        before, self.trees = self.trees, {slot: self._tree(slot) for slot in self.running if len(self.history[slot]) < self.setups[slot].longest}
        if decide is not None:
            masked = {slot for slot in self.trees if self.setups[slot].params.token_mask is not None}
            assert self.read == self.rounds or not masked & before.keys(), "masks need the whole output"
            decide()
        out, number = self._verify(), self.rounds

        def read():
            assert self.rounds - number <= self.lookahead, "the ring has been overwritten"
            self.read = number
            return out

        return SimpleNamespace(read=read)

    def _tree(self, slot: int) -> tuple[list[int], list[int]]:
        setup, known = self.setups[slot], self.history[slot]
        tokens, parents, at = [known[-1]], [-1], 0
        path = list(known)
        while len(tokens) - 1 < setup.num_speculative_tokens and len(path) - len(known) < setup.max_depth:
            true = self._target(slot, path)
            if len(tokens) - 1 + 2 <= setup.num_speculative_tokens:
                tokens.append(true % (VOCAB - 1) + 1)  # a wrong sibling, before the right one
                parents.append(at)
            right = zlib.crc32(repr(path).encode()) % 4 != 0
            tokens.append(true if right else (true + 1) % (VOCAB - 1) + 1)
            parents.append(at)
            at = len(tokens) - 1
            path.append(tokens[-1])
        return tokens, parents

    def _target(self, slot: int, tokens: list[int]) -> int:
        return self.script.get(tuple(tokens), next_token(self.setups[slot].seed, tokens))

    def tree(self, slot: int) -> tuple[list[int], list[int]]:
        return self.trees[slot]

    def set_node_masks(self, slot: int, masks: np.ndarray) -> None:
        assert masks.dtype == np.bool_ and masks.shape == (len(self.trees[slot][0]), VOCAB)
        self.masks[slot] = masks

    def _verify(self) -> SimpleNamespace:
        if self.explode:
            raise RuntimeError("device lost")
        self.rounds += 1
        size, n = self.config.max_batch_size, self.width
        zeros = lambda *shape: np.zeros(shape, dtype=np.int32)  # noqa: E731
        r = SimpleNamespace(path_len=zeros(size), emitted=zeros(size, n), error=zeros(size), tree_size=zeros(size), tree_depth=zeros(size, n),
                                       chosen=np.zeros((size, n), dtype=np.float32), top_token=zeros(size, n, 3), top_logprob=np.zeros((size, n, 3), dtype=np.float32))
        for slot in self.trees:
            known, (tokens, parents) = self.history[slot], self.trees[slot]
            committed = len(known) - 1
            assert len(self.pages[slot]) * self.config.page_size >= committed + self.slack, "the round is not covered by pages"
            assert [self.kv[self._place(slot, p)] for p in range(committed)] == known[:-1], "the KV is not the request's own"
            depth = [0] * len(tokens)
            for node in range(1, len(tokens)):
                depth[node] = depth[parents[node]] + 1
            r.tree_size[slot], r.tree_depth[slot, : len(tokens)] = len(tokens), depth
            node, path, emitted = 0, list(known), []
            while True:
                if len(path) in self.errors:
                    r.error[slot] = self.errors[len(path)]
                    break
                token = self._target(slot, path)
                if slot in self.masks:
                    allowed = self.masks[slot][node]
                    if not allowed.any():
                        r.error[slot] = 2
                        break
                    while not allowed[token]:
                        token = (token + 1) % VOCAB
                emitted.append(token)
                path.append(token)
                node = next((c for c in range(1, len(tokens)) if parents[c] == node and tokens[c] == token), None)
                if node is None:
                    break
            r.path_len[slot], r.emitted[slot, : len(emitted)] = len(emitted), emitted
            r.chosen[slot, : len(emitted)] = [logprob(t, len(known) + i) for i, t in enumerate(emitted)]
            r.top_token[slot, :, :] = [5, 6, -1]
            for i in range(len(emitted)):
                self.kv[self._place(slot, committed + i)] = path[committed + i]
            self.history[slot] = path
        return r


class Letters:
    """Tokenizer: token t is chr(96 + t) for 1..26, "<t>" above, EOS decodes to nothing."""

    def encode(self, text: str, special: bool = True, bos: bool = True) -> list[int]:
        return [ord(c) - 96 for c in text]

    def apply_chat_template(self, messages, add_generation_prompt: bool = True) -> str:
        return "z" + "y".join(m["content"] for m in messages)

    def decode(self, ids) -> str:
        return "".join("" if t == EOS else chr(96 + t) if t <= 26 else f"<{t}>" for t in ids)

    def detokenizer(self):
        return SimpleNamespace(push=lambda token: self.decode([token]), flush=lambda: "")


def make_engine(max_batch_size=4, max_model_len=256, num_pages=None, page_size=16, prefill_chunk=512, speculative=None, **fake) -> Engine:
    config = EngineConfig(max_batch_size=max_batch_size, max_model_len=max_model_len, page_size=page_size, prefill_chunk=prefill_chunk, speculative=speculative)
    round = FakeRound(config, **fake)
    if num_pages is None:
        num_pages = max_batch_size * -(-(max_model_len + round.slack) // page_size)
    round.config = config = config.with_pages(num_pages)
    return Engine(round, Letters(), config, VOCAB, (EOS,))


NGRAM = {"method": "ngram", "num_speculative_tokens": 8}


def add(engine: Engine, prompt: list[int], seed: int = 0, **params):
    params.setdefault("speculative", NGRAM)
    request = engine.prepare(prompt, SamplingParams(**params), seed)
    engine.add(request)
    return request


def finish(engine: Engine, *requests) -> list:
    """Steps until all are done; returns every event."""
    events = []
    for _ in range(10000):
        if all(r.finish_reason is not None for r in requests):
            return events
        events += engine.step()
    raise AssertionError("the engine makes no progress")


def has_work(engine: Engine) -> bool:
    return bool(engine.scheduler.waiting or engine.scheduler.running)


def assert_idle(engine: Engine) -> None:
    """Nothing is held any more."""
    assert not has_work(engine) and engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_pages and not engine.round.setups

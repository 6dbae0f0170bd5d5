"""ReplayDrafter: proposes a reference continuation, corrupted at seeded places, as chains and random trees. Random weights accept almost nothing
from a real drafter; this one makes every depth, branch and page boundary be accepted and rejected."""

from __future__ import annotations

import random

import torch

from specrt.draft.base import Drafter


class ReplayDrafter(Drafter):
    """shape: "chain" (right up to a random depth, then wrong), "tree" (random topology that holds the right path to a random depth, among
    wrong siblings, in random node order)."""

    captured = False  # it reads what is known

    def __init__(self, shape: str, vocab: int, seed: int = 0):
        self.shape, self.vocab, self.random = shape, vocab, random.Random(seed)
        self.references: dict[tuple[int, tuple[int, ...]], list[int]] = {}

    def remember(self, seed: int, prompt: list[int], generated: list[int]) -> None:
        self.references[(seed, tuple(prompt))] = list(prompt) + list(generated)

    def propose(self, slots: int, depth: int) -> None:
        s = self.state
        for slot in range(s.batch):
            budget = int(self.max_nodes[slot])
            if budget == 0 or int(s.active[slot]) == 0:
                continue
            length, seed = int(s.seq_lens[slot]), int(s.seeds[slot])
            known = s.history[slot, : length + 1].tolist()
            future = self._future(seed, known)
            tokens, parents = (self._chain if self.shape == "chain" else self._tree)(future, budget)
            n = len(tokens)
            s.tree_token[slot, 1 : 1 + n] = torch.tensor(tokens, dtype=torch.int32)
            s.tree_parent[slot, 1 : 1 + n] = torch.tensor(parents, dtype=torch.int32)
            s.tree_size[slot] = 1 + n

    def _future(self, seed: int, known: list[int]) -> list[int]:
        for (reference_seed, _), tokens in self.references.items():
            if reference_seed == seed and tokens[: len(known)] == known[: len(tokens)]:
                return tokens[len(known) :]  # nothing past its end: a round that the host stops too late
        raise AssertionError(f"the replay drafter has no reference that continues these {len(known)} tokens: an emitted token differed")

    def _wrong(self, token: int) -> int:
        return (token + 1 + self.random.randrange(self.vocab - 1)) % self.vocab

    def _chain(self, future: list[int], budget: int) -> tuple[list[int], list[int]]:
        right = self.random.randint(0, min(budget, len(future)))
        tokens = future[:right] + ([self._wrong(future[right])] if right < min(budget, len(future)) else [])
        return tokens, list(range(len(tokens)))

    def _tree(self, future: list[int], budget: int) -> tuple[list[int], list[int]]:
        tokens, parents, depth, on_path = [], [], [0], [True]  # node 0 is the root
        children: dict[int, set[int]] = {}
        size = self.random.randint(1, budget)
        while len(tokens) < size:
            parent = self.random.choice([0, len(tokens), self.random.randint(0, len(tokens))])
            at, used = depth[parent], children.setdefault(parent, set())
            right = on_path[parent] and at < len(future) and future[at] not in used and self.random.random() < 0.6
            token = future[at] if right else self.random.randrange(self.vocab)
            if token in used:
                continue
            used.add(token)
            tokens.append(token)
            parents.append(parent)
            depth.append(at + 1)
            on_path.append(on_path[parent] and at < len(future) and token == future[at])
        return tokens, parents

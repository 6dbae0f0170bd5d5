"""Trainer: a head from samples. Features are captured as they are needed, with the runtime's kernels: a pass of the target costs less than a disk."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from specrt.models.dense import DenseModel
from specrt.train.batches import Batch, make_batch, padded, plan
from specrt.train.chains import draw_chains
from specrt.train.evaluate import Acceptance, measure
from specrt.train.medusa import MedusaNetwork
from specrt.train.network import head_network
from specrt.train.new_head import output_rows, write_new_head
from specrt.train.objectives import StepRows, accepted_lengths, loss_of, row_scores, vsd_loss
from specrt.train.optimiser import Optimiser
from specrt.train.publish import write_card, write_head
from specrt.train.samples import read_files, split
from specrt.train.settings import Settings
from specrt.train.target import PAGE, TargetRows
from specrt.train.vocabulary import coverage, draft_vocabulary
from specrt.weights.checkpoint import open_checkpoint
from specrt.weights.head import Head, open_head
from specrt.weights.head_fit import fit, fit_medusa
from specrt.weights.medusa import MedusaHead, open_medusa

_STATE = "train.pt"
_SHOWN = 20  # steps between losses shown
_SAVED = 600.0  # seconds of training that an interruption may cost, at most
_LEAST_COVERAGE = 0.97  # of the answers' tokens (training.md 8)


class Trainer:
    """Reads and checks everything; ``run`` trains. The output folder then holds the best head so far (config.json, model.safetensors, README.md), log.jsonl, and train.pt, from
    which ``resume`` goes on exactly as if nothing had stopped it. ValueError if a setting, the data or the head to start from does not fit."""

    def __init__(self, s: Settings, resume: bool = False):
        self.settings, self.output = s, Path(s.output)
        self._state = self._open_state(resume)
        source = open_checkpoint(s.model)
        c = source.config
        self.device = torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, s.dtype)
        self.mixed = self.device.type == "cuda" and self.dtype == torch.bfloat16  # matrix products in bfloat16, weights in float32
        self.max_positions = c.max_position_embeddings
        self.data, samples = read_files(s.data, c.vocab_size, min(s.max_length, self.max_positions // PAGE * PAGE - (PAGE if s.objective == "vsd" else 0)))
        cold = next((h for h in self.data if s.objective == "vsd" and min(h["temperatures"]) <= 0), None)
        if cold is not None:
            raise ValueError(f"objective = 'vsd' draws at temperature 1, and samples were captured at the temperatures {cold['temperatures']}; they must be above 0 (capture --temperatures 1)")
        self.samples, self.held_out = split(samples, s.held_out)
        if s.draft_vocab_size is not None and s.draft_vocab_size > c.vocab_size:
            raise ValueError(f"draft_vocab_size = {s.draft_vocab_size} is more than the target's {c.vocab_size} tokens")
        if s.mask_token_id is not None and s.mask_token_id >= c.vocab_size:
            raise ValueError(f"mask_token_id = {s.mask_token_id}, and the target has {c.vocab_size} tokens")
        self._first = tempfile.TemporaryDirectory()  # of a new head's first weights, read again whenever one is written
        self.head = self._open_head(source)
        target = DenseModel.load(source, self.dtype, self.device, positions=padded(max(len(x.ids) for x in samples)))
        ids = self.head.target_ids()
        self.coverage = self._covered(ids)
        self.network = self._network(target, source).to(self.device)
        layers = target.num_layers
        self.rows = TargetRows(target, self.head.config.boundaries(layers) if isinstance(self.head, Head) else (layers,), ids)
        self._plans = [plan(self.samples, s.batch_tokens, s.seed, epoch) for epoch in range(s.epochs)]
        self.total = sum(map(len, self._plans))
        self.optimiser = Optimiser(self.network, s.weight_decay, fused=self.device.type == "cuda")
        self.step, self.best, self.worse = 0, 0.0, 0
        self._since: list[dict[str, Tensor]] = []  # what the steps since the last measurement measured
        if self._state is not None:
            self._restore(self._state)
        else:
            batch = self._batch(0)
            self.network.precondition(self.rows.read(batch.ids)[0].flatten(0, 1)[batch.slots], new=s.init_from is None)

    # ---------------------------------------------------------------------------------------- what is trained

    def _open_head(self, target: Any) -> Head | MedusaHead:
        s, c = self.settings, target.config
        medusa = s.method == "medusa"
        folder = s.init_from
        if folder is None:
            narrow = s.draft_vocab_size is not None and s.draft_vocab_size < c.vocab_size
            ids = draft_vocabulary(self.samples, s.draft_vocab_size, c.vocab_size)[0] if narrow else None
            write_new_head(Path(self._first.name), s, target, ids)
            folder = self._first.name
        head = open_medusa(folder) if medusa else open_head(folder)
        if isinstance(head, Head) and head.config.family != s.family:
            raise ValueError(f"init_from: {folder!r} is a head of method {head.config.family!r}, and the method is {s.method!r}")
        found = fit_medusa(head, c, s.model) if isinstance(head, MedusaHead) else fit(head, c, s.model)
        if isinstance(head, MedusaHead) and s.unroll > head.num_heads:
            raise ValueError(f"unroll = {s.unroll}, and {folder!r} has {head.num_heads} heads")
        for warning in found if s.init_from else ():
            warnings.warn(f"head {folder!r}: {warning}", stacklevel=3)
        return head

    def _covered(self, ids: Tensor | None) -> float:
        """The share of the answers' tokens that the head can draft."""
        share = 1.0 if ids is None else coverage(self.samples, ids)
        if share < _LEAST_COVERAGE:
            which, instead = ("a new draft_vocab_size", "a larger one") if self.settings.init_from is None else (f"head {self.settings.init_from!r}", "a new head, with these answers' tokens")
            warnings.warn(f"{which}: the draft vocabulary of {len(ids)} tokens covers {share:.1%} of the answers' tokens, and the others are never drafted; {instead} would draft more", stacklevel=3)
        return share

    def _network(self, target: DenseModel, source: Any) -> nn.Module:
        eps = target.config.rms_norm_eps
        if isinstance(self.head, MedusaHead):
            return MedusaNetwork(self.head, target.norm, eps)
        lm_head = target.embedding if target.config.tie_word_embeddings else output_rows(source).to(self.device, self.dtype)
        return head_network(self.head, target.embedding, lm_head, target.norm, eps)

    # ---------------------------------------------------------------------------------------- a step

    def forward(self, batch: Batch) -> list[StepRows]:
        """What the head says of a batch's rows, step by step."""
        features, states = self.rows.read(batch.ids)
        teacher, inside = self.rows.teach(states.flatten(0, 1)[batch.slots + 1])
        count, found = len(batch.slots), []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            for s, hidden in enumerate(self.network.unroll(batch.ids, features if self.mixed else features.float(), self.settings.unroll)):
                n = max(count - s, 0)  # rows whose text is over by then are not counted
                mine = hidden.flatten(0, 1)[batch.slots[:n]]
                counted = (batch.left[:n] > s).float()
                ce, alpha, hit = checkpoint(self._scores, mine, s, teacher[s:], use_reentrant=False)  # logits are made again: they would fill the memory
                rows = ce, alpha * counted, hit.float(), counted, counted * inside[s:]
                found.append(StepRows(*(pad(x, (0, count - n)) for x in rows)))
        return found

    def _scores(self, hidden: Tensor, step: int, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return row_scores(self.network.logits(hidden, step), teacher)

    def rate(self, step: int) -> float:
        """Of the optimiser's: warm-up, then a cosine down to nothing."""
        warm = max(round(self.settings.warmup * self.total), 1)
        if step < warm:
            return self.settings.lr * (step + 1) / warm
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.total - warm, 1)))

    def train_step(self) -> dict[str, Tensor]:
        """One step; what it measured, still on the device."""
        s = self.settings
        batch = self._batch(self.step)
        loss, measured = self._drawn(batch) if s.objective == "vsd" else self._unrolled(batch)
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), s.clip)
        self.optimiser.step(self.rate(self.step))
        self.step += 1
        return {"loss": loss.detach(), "norm": norm, **measured}

    def _unrolled(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.forward(batch)
        hits = torch.stack([(r.hit * r.taught).sum() / r.counted.sum().clamp_min(1) for r in rows])
        alpha = torch.stack([r.alpha.sum() / r.counted.sum().clamp_min(1) for r in rows])
        return loss_of(self.settings.objective, rows, self.settings.decay), {"agrees": hits, "alpha": alpha.detach()}

    def _drawn(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The draws are a function of seed and step."""
        s, generator = self.settings, torch.Generator(self.device)
        generator.manual_seed((s.seed << 32) + self.step)
        features, _ = self.rows.read(batch.ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            logq, logp, ce = draw_chains(self.network, self.rows, batch, features if self.mixed else features.float(), s.unroll, generator)
        return vsd_loss(logq, logp, ce), {"accepted": accepted_lengths(logq.detach(), logp).mean()}

    def _batch(self, step: int) -> Batch:
        return make_batch([self.samples[i] for i in next(islice(chain.from_iterable(self._plans), step, None))]).to(self.device)

    # ---------------------------------------------------------------------------------------- the run

    def run(self, report: Callable[[dict[str, Any]], None] = lambda row: None, advance: Callable[[int, float | None], None] = lambda steps, loss: None,
            stop_after: int | None = None) -> float:
        """Trains to the end, or until measurements get no better; returns the best acceptance length. The state is saved after every measurement, and every ten minutes between them.
        report gets every row of the log, advance the steps done and now and then the loss; stop_after: steps of this call."""
        s = self.settings
        ends = set(range(s.eval_every, self.total, s.eval_every)) if s.eval_every else {sum(map(len, self._plans[: e + 1])) for e in range(s.epochs)}
        ends.add(self.total)
        advance(self.step, None)
        last = self.total if stop_after is None else min(self.step + stop_after, self.total)
        saved = time.monotonic()
        while self.step < last and self.worse < s.patience:
            self._since.append(self.train_step())
            advance(1, float(self._since[-1]["loss"]) if self.step % _SHOWN == 0 else None)  # reading it waits for the device
            if self.step in ends:
                self._measure(report)
            if self.step in ends or time.monotonic() - saved >= _SAVED:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.best

    def _measure(self, report: Callable[[dict[str, Any]], None]) -> None:
        mean = {name: values.mean(0).tolist() for name, values in self._stacked().items()}
        self._since = []
        with tempfile.TemporaryDirectory() as folder:
            write_head(Path(folder), self.head, self.network, self.dtype)
            found = measure(Path(folder), self.settings, self.held_out, str(self.device), self.max_positions)
        better = found.length > self.best
        row = {"step": self.step, "of": self.total, **mean, "acceptance_length": found.length, "acceptance": found.by_position, "best": better}
        if better:
            self.best, self.worse = found.length, 0
            write_head(self.output, self.head, self.network, self.dtype)
            write_card(self.output, self.settings, self.data, self.samples, self._facts(found))
        else:
            self.worse += 1
        with open(self.output / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        report(row)

    def _facts(self, found: Acceptance) -> dict[str, Any]:
        ids = self.head.target_ids()
        return {"steps": f"{self.step} of {self.total}, {self.settings.epochs} epochs planned", "draft vocabulary": "the target's" if ids is None else f"{len(ids)} tokens, {self.coverage:.2%} of the answers'",
                "parameters": f"{sum(p.numel() for p in self.network.parameters()) / 1e6:.2f} million, {self.settings.dtype}",
                f"acceptance length, {len(self.held_out)} held-out prompts": f"{found.length:.3f} (greedy, chains of {self.settings.draft_tokens})",
                "accepted by position": ", ".join(f"{a:.3f}" for a in found.by_position)}

    # ---------------------------------------------------------------------------------------- stop and go on

    def _stacked(self) -> dict[str, Tensor]:
        return {name: torch.stack([m[name] for m in self._since]) for name in (self._since[0] if self._since else ())}

    def save(self) -> None:
        state = {"settings": asdict(self.settings), "step": self.step, "best": self.best, "worse": self.worse, "since": self._stacked(), "network": self.network.state_dict(),
                 "optimiser": self.optimiser.state_dict()}
        torch.save(state, self.output / f"{_STATE}.part")
        os.replace(self.output / f"{_STATE}.part", self.output / _STATE)

    def _open_state(self, resume: bool) -> dict[str, Any] | None:
        path = self.output / _STATE
        if not resume:
            if path.exists() or (self.output / "model.safetensors").exists():
                raise ValueError(f"output: {self.output} holds a head or a run already; resume it (--resume), or name another folder")
            self.output.mkdir(parents=True, exist_ok=True)
            return None
        if not path.is_file():
            raise ValueError(f"there is no run to resume in {self.output} (no {_STATE})")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key, value in asdict(self.settings).items():
            if state["settings"].get(key) != value and key not in ("device", "patience"):
                raise ValueError(f"{key} = {value!r}, but the run in {self.output} was started with {state['settings'].get(key)!r}; a run is resumed as it was started")
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.best, self.worse = state["step"], state["best"], state["worse"]
        since = {name: values.to(self.device).unbind() for name, values in state["since"].items()}
        self._since = [dict(zip(since, row)) for row in zip(*since.values())]

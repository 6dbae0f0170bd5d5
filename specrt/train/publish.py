"""Writing a head: the form it was opened in, and a card that says what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specrt.train.samples import Sample
from specrt.train.settings import Settings
from specrt.weights.head import Head
from specrt.weights.medusa import MedusaHead

_TITLES = {"eagle3": "EAGLE-3 head", "eagle3.1": "EAGLE-3.1 head", "peagle": "P-EAGLE head", "mtp": "MTP module", "medusa": "MEDUSA heads"}


def write_head(folder: Path, head: Head | MedusaHead, network: nn.Module, dtype: torch.dtype) -> None:
    """config.json as ``head`` has it, and model.safetensors with the network's weights and whatever else the head holds, under its own names (canonical ones where its file
    stacks several matrices into one)."""
    trained, source = network.published(), head.tensors
    names = {name: source.stored(name) for name in source.names()}
    stacked = {old for old, count in Counter(names.values()).items() if count > 1}
    tensors: dict[str, Tensor] = {}
    for name, old in names.items():
        value = trained[name].view(source.shape(name)) if name in trained else source.get(name)
        tensors[name if old in stacked else old] = (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(head.path / "config.json", folder / "config.json")
    save_file(tensors, folder / "model.safetensors.part")
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")  # a reader never sees half a file


def write_card(folder: Path, s: Settings, data: list[dict[str, Any]], samples: list[Sample], facts: dict[str, Any]) -> None:
    """README.md. data: how the samples were made; facts: rows of the table about this run."""
    tokens = sum(len(x.ids) - x.prompt for x in samples)
    categories = ", ".join(f"{name} ({count})" for name, count in Counter(x.category for x in samples).most_common())
    files = "\n".join(f"* {h.get('prompts')}, answered at the temperatures {h.get('temperatures')} ({h.get('repeats')} a prompt), at most {h.get('max_tokens')} tokens each" for h in data)
    rows = {"target": s.model, "method": s.family, "started from": s.init_from or "new weights", "objective": f"{s.objective}, {s.unroll} steps, decay {s.decay:g}",
            "optimiser": f"Muon for matrices, AdamW for the rest, lr {s.lr:g}, warm-up {s.warmup:g} then cosine, clip {s.clip:g}", "batch": f"{s.batch_tokens} positions, texts of at most {s.max_length}"} | facts
    method = json.dumps({"method": s.family, "model": "<this folder>", "num_speculative_tokens": s.draft_tokens})
    (folder / "README.md").write_text(f"""---
license: {s.license}
base_model: {s.model}
library_name: specrt
tags: [speculative-decoding, {s.family}]
---

# {_TITLES[s.method]} for {s.model}

    LLM({str(s.model)!r}, speculative_config={method})

It drafts; what is generated is the target's, token for token.

## Data

{len(samples)} texts, {tokens} answer tokens; {s.held_out} prompts were kept from training. By kind: {categories}.
The answers are the target's own ({data[0].get('model')}). Prompts:

{files}

## Training

| | |
|---|---|
""" + "".join(f"| {name} | {value} |\n" for name, value in rows.items()), encoding="utf-8")

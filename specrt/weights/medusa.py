"""open_medusa: MEDUSA heads in every published form (checkpoints.md C), under one set of names.

Canonical names: blocks.{j}.{b}.weight / .bias [h, h] of head j's residual blocks, lm_heads.{j}.weight [D, h] (or lm_head.weight, one for all), token_map [D] (target ids)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specrt.weights.checkpoint import locate_folder
from specrt.weights.hf import PickleSource, RenamedSource, SafetensorsSource, open_folder_tensors, read_json
from specrt.weights.names import DTYPES, some
from specrt.weights.source import TensorSource

_FILES = {"medusa_lm_head.safetensors": SafetensorsSource, "medusa_lm_head.pt": PickleSource}
_PREFIX = re.compile(r"^medusa_heads?\.")


@dataclass(frozen=True)
class MedusaHead:
    """Heads that were checked; nothing is loaded yet. The numbers are counted from the tensors: published configs are wrong about them. base: the model they were made for."""

    origin: str
    path: Path
    tensors: TensorSource
    num_heads: int
    num_layers: int
    hidden_size: int
    draft_vocab_size: int
    bias: bool
    shared_lm_head: bool
    base: str | None = None

    def target_ids(self) -> Tensor | None:
        """int64 [D]: the target's id of each draft token; None where they are the same."""
        return self.tensors.get("token_map").long() if "token_map" in self.tensors.names() else None

    def lm_head(self, j: int) -> str:
        """The name of head j's last matrix."""
        return "lm_head.weight" if self.shared_lm_head else f"lm_heads.{j}.weight"


def is_medusa(folder: Path) -> bool:
    """Whether a folder holds MEDUSA heads alone (not a whole model with its heads)."""
    try:
        names = _tensors(folder).names()
    except ValueError:
        return False
    return any(canonical_name(n) not in (None, "lm_head.weight") for n in names) and "model.embed_tokens.weight" not in names


def open_medusa(model: str) -> MedusaHead:
    """Opens and checks heads: a folder (of heads, or of a whole MEDUSA-2 model), or a hub name. ValueError says what is wrong, naming the tensor."""
    folder = locate_folder(model)
    source = _tensors(folder)
    whole = "model.embed_tokens.weight" in source.names()
    tensors = RenamedSource(source, lambda name: None if whole and not _PREFIX.match(name) else canonical_name(name) or name)
    raw = read_json(folder / "config.json")
    head = _counted(model, folder, tensors, raw.get("base_model_name_or_path") if isinstance(raw, dict) else None)
    _check(head)
    return head


def canonical_name(name: str) -> str | None:
    """None for a tensor that belongs to no form."""
    name = _PREFIX.sub("", name)
    for pattern, new in ((r"(\d+)\.(\d+)\.linear\.(weight|bias)", r"blocks.\1.\2.\3"), (r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", r"blocks.\1.\2.\3"),
                         (r"(\d+)\.\d+\.weight", r"lm_heads.\1.weight"), (r"(lm_heads\.\d+\.weight|lm_head\.weight|token_map)", r"\1")):
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return None


def _tensors(folder: Path) -> TensorSource:
    for name, source in _FILES.items():
        if (folder / name).is_file():
            return source([folder / name])
    return open_folder_tensors(folder)


def _counted(model: str, folder: Path, tensors: RenamedSource, base: object) -> MedusaHead:
    names = tensors.names()
    blocks = [tuple(map(int, n.split(".")[1:3])) for n in names if re.fullmatch(r"blocks\.\d+\.\d+\.weight", n)]
    heads = [n for n in names if n.startswith("lm_heads.")]
    shared = not heads and "lm_head.weight" in names
    if not blocks or not (heads or shared):
        raise ValueError(f"{folder} holds no MEDUSA heads: there must be tensors like '0.0.linear.weight' and '0.1.weight', or 'blocks.0.layers.0.weight' and 'lm_heads.0.weight'; "
                         f"it has {some(names)}")
    rows, hidden = tensors.shape("lm_head.weight" if shared else heads[0])
    return MedusaHead(str(model), folder, tensors, 1 + max(j for j, _ in blocks), 1 + max(b for _, b in blocks), hidden, rows, any(n.endswith(".bias") for n in names), shared,
                      base if isinstance(base, str) and base else None)


def _check(head: MedusaHead) -> None:
    h, names = head.hidden_size, set(head.tensors.names())
    expected: dict[str, tuple[int, ...]] = {head.lm_head(j): (head.draft_vocab_size, h) for j in range(head.num_heads)}
    for j in range(head.num_heads):
        for b in range(head.num_layers):
            expected[f"blocks.{j}.{b}.weight"] = (h, h)
            if head.bias:
                expected[f"blocks.{j}.{b}.bias"] = (h,)
    if "token_map" in names:
        expected["token_map"] = (head.draft_vocab_size,)
    missing, unexpected = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{head.path}: of {head.num_heads} MEDUSA heads with {head.num_layers} blocks, " + (f"tensors are missing: {some(missing)}" if missing else f"tensors do not belong to them: {some(unexpected)}"))
    for name, shape in expected.items():
        if head.tensors.shape(name) != shape:
            raise ValueError(f"{head.path}: tensor '{name}' has shape {list(head.tensors.shape(name))}, with '{head.lm_head(0)}' of {[head.draft_vocab_size, h]} it must be {list(shape)}")
        accepted = (torch.int64, torch.int32) if name == "token_map" else DTYPES
        if head.tensors.dtype(name) not in accepted:
            raise ValueError(f"{head.path}: tensor '{name}' is {head.tensors.storage(name)}, which is not supported; it must be {' or '.join(str(t).removeprefix('torch.') for t in accepted)}")
    ids = head.target_ids()
    if ids is not None and (int(ids.min()) < 0 or ids.unique().numel() != ids.numel()):
        raise ValueError(f"{head.path}: tensor 'token_map' must hold different token ids of the target, none negative")

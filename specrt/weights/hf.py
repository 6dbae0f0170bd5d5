"""Hugging Face folders: config.json with model.safetensors (one file or shards with an index) or pytorch_model.bin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
           "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class SafetensorsSource:
    """Tensors of one or more .safetensors files, memory-mapped."""

    def __init__(self, files: list[Path], weight_map: dict[str, str] | None = None):
        """weight_map: the index of a sharded checkpoint (tensor -> file name); what it says must be so."""
        self._where: dict[str, tuple[Any, tuple[int, ...], str]] = {}
        for path in files:
            try:
                opened = safe_open(path, framework="pt")
                names = list(opened.keys())
                headers = {name: opened.get_slice(name) for name in names}
                entries = {name: (opened, tuple(s.get_shape()), s.get_dtype()) for name, s in headers.items()}
            except (SafetensorError, OSError, ValueError, TypeError) as error:
                raise ValueError(f"{path} is not a readable safetensors file (truncated, or another format): {error}") from None
            for name in names:
                if weight_map is not None and weight_map.get(name) != path.name:
                    raise ValueError(f"{path} holds tensor '{name}', but the index places it in {weight_map.get(name, 'no file')}")
                if name in self._where:
                    raise ValueError(f"{path} holds tensor '{name}', which another file of the checkpoint holds too")
            self._where.update(entries)
        absent = sorted(set(weight_map or ()) - self._where.keys())
        if absent:
            raise ValueError(f"{files[0].parent}: the index lists {len(absent)} tensors that its files do not hold: {', '.join(absent[:4])}")

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][1]

    def dtype(self, name: str) -> torch.dtype | None:
        return _DTYPES.get(self._where[name][2])

    def storage(self, name: str) -> str:
        return self._where[name][2]

    def get(self, name: str) -> Tensor:
        try:
            return self._where[name][0].get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"tensor '{name}' cannot be read: {error}") from None


class PickleSource:
    """Tensors of pytorch_model.bin files (torch.load with weights_only: nothing in the file is run)."""

    def __init__(self, files: list[Path]):
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # unpickling a broken file raises almost anything
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ValueError(f"{path} is not a readable torch checkpoint (truncated, or not only weights): {reason}") from None
            if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
                raise ValueError(f"{path} must hold a dict of tensors by name, got {type(loaded).__name__}")
            self._tensors.update(loaded)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | None:
        return self._tensors[name].dtype

    def storage(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class RenamedSource:
    """A source under other names; tensors whose new name is None are left out."""

    def __init__(self, source: SafetensorsSource | PickleSource, rename):
        self._source = source
        self._old = {new: old for old in source.names() if (new := rename(old)) is not None}

    def stored(self, name: str) -> str:
        """The name in the file."""
        return self._old[name]

    def names(self) -> list[str]:
        return list(self._old)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._old[name])

    def dtype(self, name: str) -> torch.dtype | None:
        return self._source.dtype(self._old[name])

    def storage(self, name: str) -> str:
        return self._source.storage(self._old[name])

    def get(self, name: str) -> Tensor:
        return self._source.get(self._old[name])


def text_model_name(name: str) -> str | None:
    """The plain name of a text tensor of a multimodal wrapper (``language_model.`` before or inside ``model.``); None for the other towers."""
    for prefix, plain in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name if name.startswith(("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")) else None


def read_json(path: Path) -> Any:
    """The contents of a JSON file. ValueError naming it if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None


def open_folder_tensors(folder: Path) -> SafetensorsSource | PickleSource:
    """The weights of a folder: the first of model.safetensors, its index, pytorch_model.bin, its index."""
    for name, source in (("model.safetensors", SafetensorsSource), ("pytorch_model.bin", PickleSource)):
        if (folder / name).is_file():
            return source([folder / name])
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
            files = [folder / f for f in sorted(set(weight_map.values()))]
            return SafetensorsSource(files, weight_map) if source is SafetensorsSource else PickleSource(files)
    raise ValueError(f"{folder} has no weights; expected model.safetensors, pytorch_model.bin, or one of them with .index.json")


def _weight_map(index: Path) -> dict[str, str]:
    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index} must hold a 'weight_map' of tensor name -> file name")
    for file in set(weight_map.values()):
        if Path(file).name != file or not (index.parent / file).is_file():
            raise ValueError(f"{index} names '{file}', which is not a file of that folder")
    return weight_map

"""Scales for keys and values in FP8, found by calibration and stored in a checkpoint: one a layer for each. They count only where the cache is FP8 (kv_cache_dtype)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch

from specrt.weights.source import TensorSource

# k_scale and v_scale of vLLM and compressed-tensors, of older exports on the projections; kv_scale is both. Scales of queries and probabilities are for engines that quantise
# these too.
_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:(?:attn\.)?(kv|[qkv]|prob)_scale|([qkv])_proj\.(?:\3_scale|output_scale))")


def is_kv_scale(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


class KvScales:
    """The scales among a checkpoint's tensors. scheme: what its quantization_config says of the cache. Nothing is read or checked before ``read``."""

    def __init__(self, source: TensorSource, layers: int, origin: str, scheme: Any = None):
        self._source, self._layers, self._origin, self._scheme = source, layers, origin, scheme
        self._names: dict[tuple[int, str], list[str]] = {}
        for name in filter(is_kv_scale, source.names()):
            layer, plain, of_projection = _NAME.fullmatch(name).groups()
            what = plain or of_projection
            for each in {"kv": "kv", "k": "k", "v": "v"}.get(what, ""):
                self._names.setdefault((int(layer), each), []).append(name)

    @property
    def layers(self) -> int:
        """How many layers have scales."""
        return len({layer for layer, _ in self._names})

    def read(self) -> list[tuple[float, float]]:
        """(k_scale, v_scale) by layer, 1 where a layer has none. ValueError, naming the tensor or key, for what is no scale of an e4m3 cache."""
        self._check_scheme()
        beyond = sorted({layer for layer, _ in self._names if layer >= self._layers})
        if beyond:
            raise self._refusal(f"there are scales of keys or values for layer {beyond[0]}, and the model has {self._layers} layers")
        found = {layer: tuple(self._one(layer, what) for what in "kv") for layer in range(self._layers)}
        for layer, (k, v) in found.items():
            if (k is None) != (v is None):
                name = self._names[layer, "v" if k is None else "k"][0]
                raise self._refusal(f"tensor '{name}' stands alone; layer {layer} must have a k_scale and a v_scale, or neither")
        return [(1.0, 1.0) if k is None else (k, v) for k, v in found.values()]

    def _one(self, layer: int, what: str) -> float | None:
        names = self._names.get((layer, what), [])
        if not names:
            return None
        if len(names) > 1:
            raise self._refusal(f"layer {layer} has two scales for its {what}: '{names[0]}' and '{names[1]}'")
        shape, dtype = self._source.shape(names[0]), self._source.dtype(names[0])
        if math.prod(shape) != 1 or dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise self._refusal(f"tensor '{names[0]}' is {self._source.storage(names[0])} of shape {list(shape)}; an FP8 cache has one scale a layer here: float32, float16 or bfloat16, "
                             "of shape [] or [1]")
        scale = self._source.get(names[0]).float().item()
        if not math.isfinite(scale) or scale <= 0:
            raise self._refusal(f"tensor '{names[0]}' = {scale} is no scale; it must be a finite number > 0")
        return scale

    def _refusal(self, text: str) -> ValueError:
        return ValueError(f"{self._origin}: {text}")

    def _check_scheme(self) -> None:
        scheme = self._scheme
        if scheme is None or scheme == "static" or not self._names:
            return
        wanted = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True}
        given = {key: scheme.get(key, value) for key, value in wanted.items()} if isinstance(scheme, dict) else scheme
        if given != wanted:
            raise self._refusal(f"quantization_config: kv_cache_scheme {given!r} is not supported with kv_cache_dtype='fp8'; it must be {wanted!r}")


def kv_cache_scheme(config: Iterable[Any]) -> Any:
    """kv_cache_scheme of the first of these config objects that has a quantisation with one."""
    for raw in config:
        given = (raw.get("quantization_config") or raw.get("compression_config")) if isinstance(raw, dict) else None
        if isinstance(given, dict) and given.get("kv_cache_scheme") is not None:
            return given["kv_cache_scheme"]
    return None

"""FP8 (e4m3) weights: quantised at load, or as checkpoints store them, with a scale for the tensor, each output channel or each block of 128 x 128."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specrt.weights.source import TensorSource

BLOCK = 128
FP8 = torch.float8_e4m3fn
_MAX = torch.finfo(FP8).max
# Where checkpoints keep a weight's scale (X.weight_scale_inv, DeepSeek's, is a factor too) and what else they keep beside it: activations are quantised by their own
# values here, so a scale found by calibration is not needed.
_SCALES, _UNUSED = (".weight_scale_inv", ".weight_scale"), (".input_scale",)


class Fp8Weight(NamedTuple):
    """A weight [N, K] = values * scale. values: float8_e4m3fn [N, K]. scale: float32 [1, N], or [ceil(K/128), N] (an output and 128 k)."""

    values: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """float32 [N, K]."""
        n, k = self.values.shape
        scale = self.scale.repeat_interleave(BLOCK, 0)[:k] if self.scale.shape[0] > 1 else self.scale
        return self.values.float() * scale.T


def quantized(weight: Tensor) -> Fp8Weight:
    """weight [N, K] of any float dtype, with a scale for each output channel: max |row| / 448, 1 for a row of zeros. ValueError where it is not finite."""
    weight = weight.float()
    most = weight.abs().amax(1)
    if not torch.isfinite(most).all():
        raise ValueError("a weight that is not finite cannot be quantised to FP8")
    scale = most / _MAX
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return Fp8Weight((weight / scale[:, None]).clamp(-_MAX, _MAX).to(FP8), scale[None])


def stored_strategy(config: dict[str, Any]) -> str | None:
    """What config.json says the scales of stored FP8 weights are over: "tensor", "channel" or "block"; None for weights that are not quantised.

    ValueError for any quantisation that is not supported, naming the key. Known: quant_method "fp8" (weight_block_size or per tensor) and "compressed-tensors"."""
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    method = given.get("quant_method", given) if isinstance(given, dict) else given
    if method == "fp8":
        return _fp8_strategy(given)
    if method == "compressed-tensors":
        return _compressed_strategy(given)
    raise ValueError(f"quantization_config: method {method!r} is not supported; it must be absent (weights in float32, float16 or bfloat16), 'fp8' or "
                     "'compressed-tensors' with FP8 weights, or use a GGUF file")


def _fp8_strategy(given: dict[str, Any]) -> str:
    if given.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ValueError(f"quantization_config: fmt {given['fmt']!r} is not supported; it must be 'e4m3'")
    block = given.get("weight_block_size")
    if block is not None and block != [BLOCK, BLOCK]:
        raise ValueError(f"quantization_config: weight_block_size {block!r} is not supported; it must be [{BLOCK}, {BLOCK}] or absent")
    return "tensor" if block is None else "block"


def _compressed_strategy(given: dict[str, Any]) -> str | None:
    groups = given.get("config_groups")
    if groups == {} and given.get("kv_cache_scheme") is not None:
        return None  # only keys and values are meant to be quantised (kv_scales.py)
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(next(iter(groups.values())), dict):
        raise ValueError(f"quantization_config: config_groups must hold one group, got {groups!r:.200}")
    weights = next(iter(groups.values())).get("weights")
    weights = weights if isinstance(weights, dict) else {}
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8) or weights.get("symmetric", True) is not True:
        raise ValueError(f"quantization_config: weights of type {weights.get('type')!r} with num_bits {weights.get('num_bits')!r}, symmetric {weights.get('symmetric')!r} are not "
                         "supported; they must be 'float', 8, true")
    if given.get("quantization_status", "compressed") != "compressed":
        raise ValueError(f"quantization_config: quantization_status {given['quantization_status']!r} is not supported; it must be 'compressed'")
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    if strategy not in ("tensor", "channel", "block"):
        raise ValueError(f"quantization_config: weight strategy {strategy!r} is not supported; it must be 'tensor', 'channel' or 'block'")
    if strategy == "block" and block not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        raise ValueError(f"quantization_config: block_structure {block!r} is not supported; it must be [{BLOCK}, {BLOCK}]")
    return strategy


class Fp8Source:
    """A TensorSource whose e4m3 weights have their scales beside them: ``fp8`` gives both, ``get`` their product. Scales are not among the names."""

    def __init__(self, source: TensorSource, strategy: str):
        """ValueError unless every e4m3 tensor has one scale, of the strategy's shape, and every scale a tensor."""
        self._source, self.strategy = source, strategy
        names = set(source.names())
        self._scale: dict[str, str] = {}
        for name in sorted(names):
            suffix = next((s for s in _SCALES if name.endswith(s)), None)
            if suffix is not None:
                weight = name.removesuffix(suffix) + ".weight"
                if weight not in names or source.dtype(weight) != FP8:
                    raise ValueError(f"tensor '{name}' is the scale of '{weight}', which " + ("is not stored" if weight not in names else f"is {source.storage(weight)}, not F8_E4M3"))
                if weight in self._scale:
                    raise ValueError(f"tensor '{weight}' has two scales: '{self._scale[weight]}' and '{name}'")
                self._scale[weight] = name
        for name in sorted(n for n in names if source.dtype(n) == FP8):
            if name not in self._scale:
                raise ValueError(f"tensor '{name}' is F8_E4M3 and has no scale; expected '{name}_scale' or '{name}_scale_inv' beside it")
            self._check_scale(name)
        self._names = [n for n in source.names() if not n.endswith(_SCALES + _UNUSED)]

    def _check_scale(self, name: str) -> None:
        n, k = self._source.shape(name)
        scale = self._scale[name]
        got, wanted = self._source.shape(scale), {"tensor": [(), (1,), (1, 1)], "channel": [(n, 1), (n,)], "block": [(-(-n // BLOCK), -(-k // BLOCK))]}[self.strategy]
        if got not in wanted:
            raise ValueError(f"tensor '{scale}' has shape {list(got)}, but a weight of {[n, k]} quantised by {self.strategy} has {list(wanted[0])}")
        if self._source.dtype(scale) not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"tensor '{scale}' is {self._source.storage(scale)}, which is not supported; it must be float32, float16 or bfloat16")

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype | None:
        return torch.float32 if name in self._scale else self._source.dtype(name)

    def storage(self, name: str) -> str:
        return self._source.storage(name)

    def get(self, name: str) -> Tensor:
        return self.fp8(name).dequantized() if name in self._scale else self._source.get(name)

    def is_fp8(self, name: str) -> bool:
        return name in self._scale

    def fp8(self, name: str) -> Fp8Weight:
        """The stored weight. ValueError if a scale or a value is not a finite number."""
        values, scale = self._source.get(name), self._source.get(self._scale[name]).float()
        if not torch.isfinite(scale).all() or (values.view(torch.uint8) & 0x7F == 0x7F).any():
            raise ValueError(f"tensor '{name}' or its scale holds numbers that are not finite")
        n = values.shape[0]
        if self.strategy == "block":
            return Fp8Weight(values, scale.T.repeat_interleave(BLOCK, 1)[:, :n].contiguous())
        return Fp8Weight(values, scale.reshape(1, -1).expand(1, n).contiguous())

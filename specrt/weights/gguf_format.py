"""The GGUF container (version 2 and 3, little-endian): metadata and where each tensor lies. Knows no model.

Layout (ggml's docs/gguf.md): magic "GGUF", version u32, number of tensors u64, number of metadata pairs u64; the pairs (key, type u32, value);
for each tensor name, number of dimensions u32, dimensions u64 (fastest first), type u32, offset u64; then, aligned, the data. Strings are a u64 length and
UTF-8 bytes. Read here in one pass over the mapped file: the gguf package's reader takes seconds for a large vocabulary, and trusts the counts."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_DIMS = 4  # ggml's


@dataclass(frozen=True)
class GgufTensor:
    """shape: as a torch tensor's (slowest first). type: ggml's name of the storage ("Q4_1"). start, size: bytes in the file."""

    shape: tuple[int, ...]
    type: str
    start: int
    size: int


class GgufContainer:
    """``metadata``: key -> value (lists for arrays). ``tensors``: name -> GgufTensor. ValueError where the file is not what it says."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._bytes: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self._at = 0
        try:
            self._parse()
        except struct.error:
            raise ValueError(f"{path} is not a readable GGUF file: it is truncated (it ends at byte {len(self._bytes)}, inside the header)") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable GGUF file: {error}") from None

    def read(self, name: str) -> numpy.ndarray:
        """The tensor as float32, dequantised, of its shape."""
        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType[tensor.type]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = numpy.frombuffer(self._bytes, dtype=numpy.uint8, count=tensor.size, offset=tensor.start)
        if tensor.type in ("F32", "F16"):
            return raw.view(numpy.float32 if tensor.type == "F32" else numpy.float16).astype(numpy.float32).reshape(tensor.shape)
        return gguf.dequantize(raw.reshape(-1, tensor.shape[-1] // block * block_bytes), kind).reshape(tensor.shape)

    # ------------------------------------------------------------------------------------------------ parsing

    def _parse(self) -> None:
        magic = bytes(self._bytes[:4])
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} (byte-swapped: {int.from_bytes(version.to_bytes(4, 'little'), 'big')}) is not supported; supported: 2 and 3, little-endian")
        num_tensors, num_pairs = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            if key in self.metadata:
                raise ValueError(f"metadata '{key}' occurs twice")
            self.metadata[key] = self._value(self._scalar("<I"), key)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"metadata 'general.alignment' must be an integer > 0, got {alignment!r}")
        found = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in found:
                raise ValueError(f"tensor '{name}' occurs twice")
            dims = self._scalar("<I")
            if not 1 <= dims <= _MAX_DIMS:
                raise ValueError(f"tensor '{name}' has {dims} dimensions")
            found[name] = tuple(self._scalar("<Q") for _ in range(dims))[::-1], self._scalar("<I"), self._scalar("<Q")
        data = -(-self._at // alignment) * alignment
        self.tensors = {name: self._placed(name, shape, kind, data + offset) for name, (shape, kind, offset) in found.items()}

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        try:
            kind = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"tensor '{name}' has quantisation type {kind}, which is unknown") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not prod(shape) or shape[-1] % block:
            raise ValueError(f"tensor '{name}' has shape {list(shape)}; rows of {kind.name} come in blocks of {block}")
        size = prod(shape) // block * block_bytes
        if start + size > len(self._bytes):
            raise ValueError(f"it is truncated: tensor '{name}' needs the bytes up to {start + size}, the file has {len(self._bytes)}")
        return GgufTensor(shape, kind.name, start, size)

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._bytes, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        end = self._at + length
        if end > len(self._bytes):
            raise ValueError(f"it is truncated: a string at byte {self._at} has {length} bytes, the file ends at {len(self._bytes)}")
        text = self._bytes[self._at:end].decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"metadata '{key}' has type {kind}, which is unknown")
        kind, count = self._scalar("<I"), self._scalar("<Q")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"metadata '{key}' is an array of type {kind}, which is not supported")
        item = _SCALARS[kind]
        if self._at + count * struct.calcsize(item) > len(self._bytes):
            raise ValueError(f"it is truncated: metadata '{key}' has {count} entries, the file ends at {len(self._bytes)}")
        values = list(struct.unpack_from(f"<{count}{item[1]}", self._bytes, self._at))
        self._at += count * struct.calcsize(item)
        return values

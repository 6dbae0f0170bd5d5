"""The flags that the commands share, and how they become ``LLM`` and ``SamplingParams`` arguments. A flag that was not given is not passed on:
defaults live in one place, the API."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specrt import LLM, SamplingParams

ENGINE = ("device", "dtype", "quantization", "kv_cache_dtype", "max_batch_size", "max_model_len", "kv_cache_memory", "page_size", "enforce_eager")
SPECULATION = ("method", "num_speculative_tokens", "num_steps", "eagle_topk", "num_draft_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
            "min_tokens", "max_tokens", "ignore_eos", "stop", "stop_token_ids", "seed", "n", "logprobs")


def numbers(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between them are expected, like 0,0.6,1.0, got {text!r}") from None


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is expected, got {text!r}")
    return value


def logit_bias(text: str) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in json_object(text).items()}
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f'token ids and numbers are expected, like {{"42": -1.5}}, got {text!r}') from None


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2-135m", help="folder, .gguf or .safetensors file, hub name, or smollm2-135m (the default)")
    group.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group.add_argument("--dtype", choices=["bfloat16", "float32"])
    group.add_argument("--quantization", choices=["fp8"])
    group.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], help="of keys and values, a drafter's too: as --dtype (auto), or e4m3 (fp8)")
    group.add_argument("--max-batch-size", type=int, metavar="N")
    group.add_argument("--max-model-len", type=int, metavar="N")
    group.add_argument("--kv-cache-memory", type=int, metavar="BYTES", help="for keys and values, a drafter's too (default: all that the batch can use, on CUDA at most 85 %% of what is free)")
    group.add_argument("--page-size", type=int, metavar="N")
    group.add_argument("--enforce-eager", action="store_true", default=None, help="no CUDA graphs")
    group = parser.add_argument_group("speculation")
    group.add_argument("--method", metavar="NAME", help="ngram, draft_model, eagle, eagle3, peagle, mtp, medusa, layerskip, or none")
    group.add_argument("--draft-model", metavar="MODEL", help="the draft model's or head's path or name (method draft_model unless --method says otherwise); left out: the head that comes with the package for the model and --method")
    group.add_argument("--num-speculative-tokens", type=int, metavar="N", help="length of a draft chain")
    group.add_argument("--num-steps", type=int, metavar="N", help="depth of a draft tree")
    group.add_argument("--eagle-topk", type=int, metavar="N", help="children of a tree node")
    group.add_argument("--num-draft-tokens", type=int, metavar="N", help="verified nodes of a tree, root included")
    group.add_argument("--spec", "--speculative-config", type=json_object, action="append", metavar="JSON",
                       help="the whole speculative_config; single flags override its keys (bench --acceptance measures several, one after another)")


def add_sampling_arguments(parser: argparse.ArgumentParser, several_temperatures: bool = False) -> None:
    group = parser.add_argument_group("sampling")
    if several_temperatures:
        group.add_argument("--temperature", type=numbers, metavar="X[,X...]", help="with --acceptance several, with commas between them")
    else:
        group.add_argument("--temperature", type=float, metavar="X")
    for name in ("top-p", "min-p", "repetition-penalty", "presence-penalty", "frequency-penalty"):
        group.add_argument(f"--{name}", type=float, metavar="X")
    for name in ("top-k", "min-tokens", "max-tokens", "seed", "n", "logprobs"):
        group.add_argument(f"--{name}", type=int, metavar="N")
    group.add_argument("--logit-bias", type=logit_bias, metavar="JSON", help='{"token id": bias, ...}')
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text (may be given several times)")
    group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID")


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def speculative_config(args: argparse.Namespace, default_method: str | None = None) -> dict[str, Any] | None:
    """The engine's speculative_config; None for --method none, or where neither a flag nor ``default_method`` asks for speculation."""
    if len(args.spec or []) > 1:
        raise ValueError(f"--spec was given {len(args.spec)} times: only bench --acceptance measures several")
    return speculative_configs(args, default_method)[0]


def speculative_configs(args: argparse.Namespace, default_method: str | None = None) -> list[dict[str, Any] | None]:
    """One for each --spec, single flags over each of them."""
    return [_speculative_config(args, spec, default_method) for spec in args.spec or [{}]]


def _speculative_config(args: argparse.Namespace, spec: dict[str, Any], default_method: str | None) -> dict[str, Any] | None:
    config = {**spec, **_given(args, SPECULATION)}
    if args.draft_model is not None:
        config = {"method": "draft_model", **config, "model": args.draft_model}
    if config.get("method") == "none":
        if len(config) > 1:
            raise ValueError(f"--method none goes with no other speculation flag, got {sorted(set(config) - {'method'})}")
        return None
    if "method" not in config and default_method is not None:
        config["method"] = default_method
    return config or None


def load(args: argparse.Namespace, default_method: str | None = None, requests: int = 1) -> "LLM":
    """``requests``: how many the command has at a time; no KV cache is needed for more (unless --max-batch-size says so)."""
    from specrt import LLM

    return LLM(args.model, speculative_config=speculative_config(args, default_method), **engine(args, requests))


def engine(args: argparse.Namespace, requests: int = 1) -> dict[str, Any]:
    """The ``LLM`` arguments besides the model and the speculation."""
    return {"max_batch_size": requests, **_given(args, ENGINE)}


def sampling(args: argparse.Namespace, **more: Any) -> "SamplingParams":
    from specrt import SamplingParams

    return SamplingParams(**{**given_sampling(args), **more})


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    return _given(args, SAMPLING)


def read_text(path: str | Path) -> str:
    """A UTF-8 text file. ValueError says what is wrong with it."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None

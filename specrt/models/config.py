"""ModelConfig: the shape of a dense decoder, read from a Hugging Face config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mimo": "MiMoForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3")
MAX_LAYERS = 4096  # a damaged file may say anything; lists as long as this are built from it


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer (Llama 2/3, Mistral, Qwen2/2.5, Qwen3, MiMo).

    architecture: a key of ``ARCHITECTURES``. windows: one a layer, the number of last positions a row sees, 0 = all. attention_bias: q, k and v have
    a bias; o_bias, mlp_bias: so have o, and gate, up and down. qk_norm: RMSNorm of each query and key head before RoPE.
    rope_scaling: None, or {"rope_type": "linear", "factor"}, or {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings"}, or {"rope_type": "factors", "factors": head_dim/2 divisors of the frequencies} (GGUF's rope_freqs).
    eos_token_ids: every token that ends an answer; may be empty. exit_layer: layers after which a model trained for it may draft (LayerSkip), where its files say so."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    windows: tuple[int, ...] = ()
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    exit_layer: int | None = None

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture '{self.architecture}'; supported: {', '.join(ARCHITECTURES)}")
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for num_layers = {self.num_layers}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_attention_heads = {self.num_heads} is not a multiple of num_key_value_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; RoPE rotates pairs")
        for name, value in [("bos_token_id", self.bos_token_id), *(("eos_token_id", e) for e in self.eos_token_ids)]:
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} = {value} is outside the vocabulary of {self.vocab_size}")

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights, a tied head counted once."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_heads + 2 * self.num_kv_heads)
        bias = self.attention_bias * d * (self.num_heads + 2 * self.num_kv_heads) + self.o_bias * h + self.mlp_bias * (2 * self.intermediate_size + h)
        layer = attention + 3 * h * self.intermediate_size + 2 * h + 2 * d * self.qk_norm + bias
        return self.num_layers * layer + h + (1 if self.tie_word_embeddings else 2) * self.vocab_size * h

    @classmethod
    def from_hf(cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> ModelConfig:
        """From the contents of config.json (and generation_config.json, for its stop tokens and assistant_early_exit). ValueError names the key and what it would accept."""
        if not isinstance(config, dict):
            raise ValueError(f"config.json must hold an object, got {type(config).__name__}")
        text = config.get("text_config", config)
        if not isinstance(text, dict):
            raise ValueError(f"text_config must be an object, got {type(text).__name__}")
        architecture = _architecture(text)
        read = Reader(text)
        heads = read.integer("num_attention_heads")
        hidden = read.integer("hidden_size")
        layers = read.integer("num_hidden_layers", most=MAX_LAYERS)
        head_dim = read.integer("head_dim", 128 if architecture == "qwen3" else None, optional=True)
        if head_dim is None:
            if hidden % heads:
                raise ValueError(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}, and there is no head_dim")
            head_dim = hidden // heads
        activation = text.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ValueError(f"hidden_act = {activation!r} is not supported; it must be 'silu'")
        max_positions = read.integer("max_position_embeddings", 2048 if architecture == "llama" else 32768)
        theta, scaling = _rope(text, max_positions)
        bias = architecture in ("llama", "qwen3") and read.boolean("attention_bias", False)
        tie = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        if tie is not None and not isinstance(tie, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, got {tie!r}")
        eos = _token_ids("eos_token_id", text.get("eos_token_id", config.get("eos_token_id")))
        eos += _token_ids("eos_token_id of generation_config.json", (generation_config or {}).get("eos_token_id"))
        bos = _token_ids("bos_token_id", text.get("bos_token_id", config.get("bos_token_id")))
        return cls(
            architecture=architecture, vocab_size=read.integer("vocab_size"), hidden_size=hidden, intermediate_size=read.integer("intermediate_size"),
            num_layers=layers, num_heads=heads, num_kv_heads=read.integer("num_key_value_heads", heads), head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling, max_position_embeddings=max_positions,
            tie_word_embeddings=bool(tie), windows=_windows(read, architecture, layers), attention_bias=architecture in ("qwen2", "mimo") or bias, o_bias=bias,
            mlp_bias=architecture == "llama" and read.boolean("mlp_bias", False), qk_norm=architecture == "qwen3",
            bos_token_id=bos[0] if bos else None, eos_token_ids=tuple(dict.fromkeys(eos)),
            exit_layer=Reader(generation_config or {}).integer("assistant_early_exit", optional=True))


class Reader:
    """Typed reads of a config's keys; a null counts as absent."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def integer(self, key: str, default: int | None = None, optional: bool = False, most: int = 2**31 - 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{key} must be an integer >= 1 and <= {most}, " + ("and it is missing" if value is None else f"got {value!r}"))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        return positive(key, default if value is None else value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        return value


def positive(key: str, value: Any) -> float:
    """``value`` as a float if it is a finite number > 0; else a ValueError naming the key."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} must be a finite number > 0, " + ("and it is missing" if value is None else f"got {value!r}"))
    return float(value)


def architecture_names(config: dict[str, Any]) -> list[str]:
    """The names under ``architectures``; none where the key is absent."""
    named = config.get("architectures")
    if named is not None and (not isinstance(named, list) or not all(isinstance(n, str) for n in named)):
        raise ValueError(f"architectures must be a list of names, got {named!r:.100}")
    return named or []


def _architecture(text: dict[str, Any]) -> str:
    named, kind = architecture_names(text), text.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"model_type must be a name, got {kind!r:.100}")
    if kind is None:
        kind = next((k for k, name in ARCHITECTURES.items() if name in named), None)
    supported = f"supported model types: {', '.join(ARCHITECTURES)}"
    if kind is None:
        raise ValueError(f"config.json has no model_type; {supported}" if not named else f"unknown architecture {named[0]!r}; {supported}")
    if kind not in ARCHITECTURES:
        raise ValueError(f"unknown architecture: model_type {kind!r}; {supported}")
    # A task head or a draft head on the same trunk has the trunk's model_type, and is no language model.
    if named and not any(n in (ARCHITECTURES[kind], ARCHITECTURES[kind].replace("ForCausalLM", "Model")) for n in named):
        raise ValueError(f"unknown architecture {named[0]!r}; with model_type {kind!r} it must be {ARCHITECTURES[kind]!r}")
    return kind


def _rope(text: dict[str, Any], max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling). Old files have rope_theta and rope_scaling, those of Transformers 5 one rope_parameters with everything."""
    key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    given = text.get(key) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{key} must be an object, got {given!r}")
    theta = given.get("rope_theta", text.get("rope_theta"))
    theta = positive("rope_theta", 10000.0 if theta is None else theta)
    fraction = given.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if fraction not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor = {fraction!r} is not supported; it must be 1")
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"{key}: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": positive(f"{key}.factor", given.get("factor"))}
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            scaling[name] = positive(f"{key}.{name}", given.get(name))
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"{key}: low_freq_factor = {scaling['low_freq_factor']} must be below high_freq_factor = {scaling['high_freq_factor']}")
        scaling["original_max_position_embeddings"] = Reader(given).integer("original_max_position_embeddings", max_positions)
    return theta, scaling


def _windows(read: Reader, architecture: str, layers: int) -> tuple[int, ...]:
    """Sliding windows. Llama has none; Mistral has one for all layers (4096 where the key is absent, none where it is null); in Qwen they are off unless
    use_sliding_window, and then hold for layer_types == "sliding_attention", or for the layers from max_window_layers on."""
    if architecture == "llama" or (architecture != "mistral" and not read.boolean("use_sliding_window", False)):
        return (0,) * layers
    if "sliding_window" in read.values and read.values["sliding_window"] is None:
        return (0,) * layers
    window = read.integer("sliding_window", 4096)
    kinds = read.values.get("layer_types")
    if kinds is None:
        first = 0 if architecture == "mistral" else read.values.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"max_window_layers must be an integer >= 0, got {first!r}")
        return tuple(window if i >= first else 0 for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        raise ValueError(f"layer_types must list 'full_attention' or 'sliding_attention' for each of the {layers} layers, got {kinds!r}")
    return tuple(window if k == "sliding_attention" else 0 for k in kinds)


def _token_ids(key: str, value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{key} must be an integer or a list of integers, got {value!r}")
    return ids

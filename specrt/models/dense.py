"""DenseModel: Llama 2/3, Mistral, Qwen2/2.5, Qwen3 and MiMo decoders. Wiring only; the arithmetic is in the ops."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.layers.batch import RowBatch
from specrt.layers.linear import Fp8Linear, Linear, Normed
from specrt.layers.rope import rope_tables
from specrt.models.config import ModelConfig
from specrt.weights.checkpoint import Checkpoint
from specrt.weights.fp8 import Fp8Source, quantized

# Rows of a tree, the target's or a drafter's, stand up to MAX_NODES - 1 = 63 past the last position that is served, and need their angles.
POSITION_SLACK = 128


class Layer(NamedTuple):
    input_norm: Tensor
    qkv: Linear | Fp8Linear  # q heads, k heads, v heads
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int
    o: Linear | Fp8Linear
    post_norm: Tensor
    gate_up: Linear | Fp8Linear  # rows alternate (layers.linear.alternate)
    down: Linear | Fp8Linear


class Buffers(NamedTuple):
    """Activations of one forward pass over R rows, written anew by each."""

    residual: Tensor  # [R, H]
    scaled: Tensor  # [R, H]; after the pass: its result
    squares: Tensor  # float32 ops.squares_shape(R, H)
    qkv: Tensor  # [R, (Hq + 2 Hkv) D]
    q: Tensor  # [R, Hq, D]
    attended: Tensor  # [R, Hq, D]
    activated: Tensor  # [R, I]


class Scratch:
    """The buffers of a model for up to ``rows`` rows, and their views for each smaller capacity that was used."""

    def __init__(self, rows: int, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        c = config
        hidden, heads = (rows, c.hidden_size), (rows, c.num_heads, c.head_dim)
        shapes = (hidden, hidden, ops.squares_shape(*hidden), (rows, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim), heads, heads, (rows, c.intermediate_size))
        self.rows = rows
        self._views = {rows: Buffers(*(torch.zeros(shape, dtype=torch.float32 if name == "squares" else dtype, device=device) for name, shape in zip(Buffers._fields, shapes)))}

    def view(self, rows: int) -> Buffers:
        views = self._views.get(rows)
        if views is None:
            if rows > self.rows:
                raise ValueError(f"a batch of {rows} rows does not fit buffers made for {self.rows}")
            views = self._views[rows] = Buffers(*(b[:rows] for b in self._views[self.rows]))
        return views


class DenseModel:
    """A loaded model. Every row's result is a function of that row's token, position and visible keys alone (csrc/README.md)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, embedding: Tensor, layers: list[Layer], norm: Tensor, lm_head: Linear | Fp8Linear,
                 kv_dtype: torch.dtype, kv_scales: list[tuple[float, float]] | None = None, positions: int | None = None):
        self.config, self.dtype, self.device = config, dtype, device
        #: Of its KV pools: dtype or ops.FP8; (k_scale, v_scale) by layer, None: 1.
        self.kv_dtype, self.kv_scales = kv_dtype, kv_scales
        self.num_layers, self.kv_heads, self.head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.embedding, self.layers, self.norm, self.lm_head = embedding, layers, norm, lm_head
        #: How many are served: there are angles for as many, and POSITION_SLACK more.
        self.positions = config.max_position_embeddings if positions is None else min(positions, config.max_position_embeddings)
        self.cos, self.sin = rope_tables(config.head_dim, config.rope_theta, config.rope_scaling, self.positions + POSITION_SLACK, device)
        self._scale = config.head_dim**-0.5

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str, quantization: str | None = None,
             kv_dtype: torch.dtype | None = None, positions: int | None = None) -> DenseModel:
        """Reads the weights tensor by tensor; each is rounded to ``dtype`` once, as the last step. dtype: bfloat16 or float32. FP8 matrices stay as they are stored;
        quantization "fp8": those of a checkpoint that has none are quantised with a scale for each output channel, all but lm_head. kv_dtype: None = ``dtype``, or ops.FP8: then with the checkpoint's
        scales for keys and values. positions: most that are served; None = all that the config has. ValueError if there are no kernels for the model's shape, before anything is read."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")
        c, source, device = checkpoint.config, checkpoint.tensors, torch.device(device)
        stored_fp8 = isinstance(source, Fp8Source)
        check_kernels(c, device, stored_fp8 or quantization == "fp8")
        kv_scales = checkpoint.kv_scales.read() if kv_dtype == ops.FP8 and checkpoint.kv_scales is not None else None

        def vector(name: str) -> Tensor:
            return source.get(name).to(device=device, dtype=dtype).contiguous()

        def matrix(name: str) -> Tensor:
            return embedding if name == "model.embed_tokens.weight" else source.get(name)

        def linear(names: list[str], bias: bool = False, gate_up: bool = False) -> Linear | Fp8Linear:
            weights, biases = [f"{n}.weight" for n in names], [source.get(f"{n}.bias") for n in names] if bias else []
            fp8 = [w for w in weights if stored_fp8 and source.is_fp8(w)]
            if fp8 and fp8 != weights:
                raise ValueError(f"{checkpoint.origin}: '{fp8[0]}' is FP8 and of {', '.join(map(repr, weights))} not all are; they are one matrix here, so all must be or none")
            if fp8:
                return Fp8Linear([source.fp8(w) for w in weights], biases, device, gate_up)
            if quantization == "fp8" and not stored_fp8:
                return Fp8Linear([quantized(matrix(w).to(device)) for w in weights], biases, device, gate_up)
            return Linear([matrix(w) for w in weights], biases, dtype, device, gate_up)

        def layer(i: int) -> Layer:
            at, attn, mlp = f"model.layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            return Layer(
                input_norm=vector(at + "input_layernorm.weight"), qkv=linear([attn + "q_proj", attn + "k_proj", attn + "v_proj"], c.attention_bias),
                q_norm=vector(attn + "q_norm.weight") if c.qk_norm else None, k_norm=vector(attn + "k_norm.weight") if c.qk_norm else None,
                window=c.windows[i], o=linear([attn + "o_proj"], c.o_bias), post_norm=vector(at + "post_attention_layernorm.weight"),
                gate_up=linear([mlp + "gate_proj", mlp + "up_proj"], c.mlp_bias, gate_up=True), down=linear([mlp + "down_proj"], c.mlp_bias))

        embedding = vector("model.embed_tokens.weight")
        # lm_head is quantised only if it is stored so: on SmolLM2 it alone costs 2.7 % of perplexity, all other matrices together 0.4 %.
        head = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
        lm_head = linear([head]) if stored_fp8 else Linear([matrix(f"{head}.weight")], [], dtype, device)
        return cls(c, dtype, device, embedding, [layer(i) for i in range(c.num_layers)], vector("model.norm.weight"), lm_head, kv_dtype or dtype, kv_scales, positions)

    def first_layers(self, count: int) -> DenseModel:
        """The model that leaves off after ``count`` layers, under the same embedding, final norm and lm_head; the tensors are shared."""
        view = copy.copy(self)
        view.config = replace(self.config, num_layers=count, windows=self.config.windows[:count])
        view.num_layers, view.layers = count, self.layers[:count]
        view.kv_scales = None if self.kv_scales is None else self.kv_scales[:count]
        return view

    def make_scratch(self, rows: int) -> Scratch:
        """Buffers for forward passes of up to ``rows`` rows. Passes that share them must not overlap."""
        return Scratch(rows, self.config, self.dtype, self.device)

    def forward(self, batch: RowBatch, pool: KVPool, scratch: Scratch, features: dict[int, Tensor] | None = None) -> Tensor:
        """The hidden rows after the final norm, [R, H] in scratch (valid until its next use); appends the rows' keys and values to the pool.

        features: boundary j -> tensor [R, H] that receives the residual stream entering layer j (j = num_layers: leaving the last one, before the norm)."""
        residual, scaled, squares, qkv, q, attended, activated = scratch.view(batch.rows)
        n, eps, features = batch.num_rows, self.config.rms_norm_eps, features or {}
        normed = Normed(scaled, squares, eps)
        position, slot, request, prefix, table = batch.position, batch.slot, batch.request, batch.prefix, batch.block_table
        cos, sin, scale, flat = self.cos, self.sin, self._scale, attended.flatten(1)
        stream = features.get(0, residual)  # what the layer at hand reads
        if not batch.prefill:
            ops.attention_plan(request, prefix, batch.ancestors, batch.paths, n, table.shape[0], self.config.num_heads, self.kv_heads,
                               table.shape[1] * pool.page_size, pool.fp8, batch.workspace.plan)
        ops.embedding(self.embedding, batch.token, self.layers[0].input_norm, n, stream, scaled, squares, early=not batch.prefill)
        for j, (layer, (k_pool, v_pool, *kv_scales)) in enumerate(zip(self.layers, pool.layers())):
            layer.qkv.normed(normed, n, qkv)
            ops.rope_append(qkv, position, slot, cos, sin, layer.q_norm, layer.k_norm, eps, n, q, k_pool, v_pool, *kv_scales)
            if batch.prefill:
                ops.prefill_attention(q, k_pool, v_pool, table, request, prefix, scale, layer.window, n, attended, *kv_scales)
            else:
                ops.tree_attention(q, k_pool, v_pool, table, request, prefix, batch.ancestors, batch.paths, scale, layer.window, n,
                                   batch.workspace.plan, batch.workspace.partials, attended, *kv_scales)
            layer.o.add(flat, n, stream, residual, layer.post_norm, normed)
            layer.gate_up.silu(normed, n, activated)
            stream = features.get(j + 1, residual)
            layer.down.add(activated, n, residual, stream, self.layers[j + 1].input_norm if j + 1 < self.num_layers else None, normed)
        ops.rms_norm(stream, self.norm, eps, n, scaled)
        return scaled

    def logits(self, hidden: Tensor, num_rows: Tensor, out: Tensor) -> None:
        """Raw logits of hidden rows [R, H] into float32 [R, V], unrounded."""
        self.lm_head(hidden, num_rows, out)

    @property
    def samples(self) -> bool:
        """Whether lm_head can choose tokens itself (``sample``): not with FP8 weights."""
        return isinstance(self.lm_head, Linear)

    def sample(self, hidden: Tensor, batch: RowBatch, seeds: Tensor, sampling_f: Tensor, token: Tensor, status: Tensor, logprob: Tensor | None) -> None:
        """The tokens of hidden rows [R, H], and how likely each was, without a row of logits (ops.linear_sample)."""
        self.lm_head.sample(hidden, batch.num_rows, batch.request, batch.position, seeds, sampling_f, token, status, logprob)


def check_kernels(config: ModelConfig, device: torch.device, fp8: bool) -> None:
    """What the ops are built for (csrc/ops), said in the words of the config."""
    group = config.num_heads // config.num_kv_heads
    if device.type == "cuda":
        if config.head_dim not in (64, 96, 128):
            raise ValueError(f"head_dim = {config.head_dim} is not supported on CUDA; supported: 64, 96, 128")
        if group > 16:
            raise ValueError(f"{group} query heads a KV head are not supported on CUDA; supported: up to 16")
        if fp8 and (config.hidden_size % 16 or config.intermediate_size % 16):
            raise ValueError(f"hidden_size = {config.hidden_size}, intermediate_size = {config.intermediate_size}: FP8 weights on CUDA need multiples of 16")
    if config.intermediate_size % 8:
        raise ValueError(f"intermediate_size = {config.intermediate_size} is not supported; it must be a multiple of 8")
    if device.type != "cuda" and config.head_dim % 16:
        raise ValueError(f"head_dim = {config.head_dim} is not supported; it must be a multiple of 16")

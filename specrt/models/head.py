"""HeadModel: the networks of draft heads that take a token together with a feature of the token before it (drafters.md 0.1): EAGLE, EAGLE-3, MTP. Wiring only.

A slot's feature comes from the target (``combine``) or, in a draft's further steps, from the head's own last output. Buffers are short-lived, from torch's pool."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.layers.batch import RowBatch
from specrt.layers.linear import Fp8Linear, Linear, Normed
from specrt.layers.rope import rope_tables
from specrt.models.dense import DenseModel, Layer, check_kernels
from specrt.weights.fp8 import quantized
from specrt.weights.head import Head


class HeadWeights:
    """Reads a head's weights: each rounded to the target's dtype once, as the last step, or with quantization "fp8" its matrices quantised."""

    def __init__(self, head: Head, target: DenseModel, quantization: str | None = None):
        self.head, self.target, self.config = head, target, head.config
        self._source, self._names, self._fp8 = head.tensors, set(head.tensors.names()), quantization == "fp8"
        check_kernels(head.config.layers, target.device, self._fp8)

    def raw(self, name: str) -> Tensor:
        return self._source.get(name).to(device=self.target.device, dtype=self.target.dtype).contiguous()

    def vector(self, name: str) -> Tensor:
        return self.raw(f"{name}.weight")

    def optional(self, name: str) -> Tensor | None:
        return self.vector(name) if f"{name}.weight" in self._names else None

    def linear(self, names: list[str], gate_up: bool = False) -> Linear | Fp8Linear:
        weights, biases = [self._source.get(f"{n}.weight") for n in names], [self._source.get(f"{n}.bias") for n in names if f"{n}.bias" in self._names]
        if self._fp8:
            return Fp8Linear([quantized(w.to(self.target.device)) for w in weights], biases, self.target.device, gate_up)
        return Linear(weights, biases, self.target.dtype, self.target.device, gate_up)

    def layer(self, i: int) -> Layer:
        at = f"layers.{i}."
        norms = {name: self.optional(at + key) for name, key in [("input_norm", "input_layernorm"), ("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm")]}
        return Layer(**norms, window=self.config.layers.windows[i], qkv=self.linear([f"{at}self_attn.{x}_proj" for x in "qkv"]), o=self.linear([f"{at}self_attn.o_proj"]),
                     post_norm=self.vector(at + "post_attention_layernorm"), gate_up=self.linear([f"{at}mlp.{x}_proj" for x in ("gate", "up")], gate_up=True),
                     down=self.linear([f"{at}mlp.down_proj"]))

    def embedding(self) -> Tensor:
        """The target's own tensor where the head has none, or the same."""
        own, theirs = self.optional("embed_tokens"), self.target.embedding
        if own is None or (own.shape == theirs.shape and torch.equal(own, theirs)):
            return theirs
        missing = theirs.shape[0] - own.shape[0]  # rows that pad the target's vocabulary
        return torch.nn.functional.pad(own, (0, 0, 0, missing)) if missing > 0 else own

    def lm_head(self) -> Linear | Fp8Linear:
        if self.config.own_lm_head:
            return self.linear(["lm_head"])
        return self.linear(["embed_tokens"]) if self.head.tied else self.target.lm_head


class HeadModel(ABC):
    """What the families share: the decoder layers and the output. A family says how features are combined and how the first layer is entered."""

    def __init__(self, weights: HeadWeights):
        self.config, target, c = weights.config, weights.target, weights.config.layers
        self.dtype, self.device = target.dtype, target.device
        self.kv_dtype = target.kv_dtype  # a head's own pool is as its target's; published heads have no scales
        self.num_layers, self.kv_heads, self.head_dim, self.hidden_size, self.eps = c.num_layers, c.num_kv_heads, c.head_dim, c.hidden_size, c.rms_norm_eps
        self.embedding = weights.embedding()
        self.layers = [weights.layer(i) for i in range(c.num_layers)]
        self.fc = weights.linear(["fc"]) if self.config.fc_inputs else None
        self.norm = weights.optional("norm")
        self.lm_head = weights.lm_head()
        ids = weights.head.target_ids() if self.config.own_lm_head else None
        #: int64 [D], ascending: the target's id of each token of the head's vocabulary; None = the same ids.
        self.target_ids = None if ids is None else ids.to(target.device)
        self.vocab = self.lm_head.out_features  # the target's may be padded otherwise than the head's config says
        #: Of a slot whose feature is not known: what ``combine`` takes instead of the boundaries, side by side.
        self.missing: Tensor | None = None
        self._target_norm, self._target_eps, self._scale = target.norm, target.config.rms_norm_eps, c.head_dim**-0.5

    def size(self, positions: int) -> None:
        """RoPE for this many positions: what is served, not what the head's config says; its angles are the head's own."""
        c = self.config.layers
        self.cos, self.sin = rope_tables(c.head_dim, c.rope_theta, c.rope_scaling, positions, self.device)

    def new(self, rows: int, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=self.dtype, device=self.device)

    def normed(self, x: Tensor, weight: Tensor, n: Tensor, eps: float | None = None) -> Tensor:
        out = torch.empty_like(x)
        ops.rms_norm(x, weight, eps or self.eps, n, out)
        return out

    def combine(self, features: list[Tensor], num_rows: Tensor, source: Tensor | None = None) -> Tensor:
        """A slot's feature [R, h] from the target's captured boundaries, [F, Ht] each, of which it takes row ``source`` (int32 [R]; None: its own, F = R; -1: ``missing``); of most
        families the last boundary, after the target's final norm."""
        return self._gathered(features[:1], [self._target_norm], self._target_eps, num_rows, source)

    def _gathered(self, features: list[Tensor], norms: list[Tensor], eps: float, num_rows: Tensor, source: Tensor | None) -> Tensor:
        out = self.new((features[0] if source is None else source).shape[0], len(features) * features[0].shape[1])
        ops.join_rows(features, norms, source, self.missing, eps, num_rows, out)
        return out

    @abstractmethod
    def _enter(self, batch: RowBatch, feature: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor]:
        """(residual stream [R, h], input of the first layer's q, k and v)."""

    def _joined(self, batch: RowBatch, feature: Tensor, parent: Tensor | None, token_norm: Tensor | None, feature_norm: Tensor | None, feature_first: bool = False,
                stream: Tensor | None = None, stream_normed: bool = False) -> Tensor:
        """Embedding and feature side by side, see ``ops.head_input``."""
        out = self.new(batch.rows, 2 * self.hidden_size)
        ops.head_input(self.embedding, batch.token, feature, parent, token_norm, feature_norm, self.eps, feature_first, batch.num_rows, out, stream, stream_normed, early=not batch.prefill)
        return out

    def forward(self, batch: RowBatch, feature: Tensor, pool: KVPool, parent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(hidden rows for ``logits``, features for the slots after these), [R, h] each; appends keys and values to the pool. parent int32 [R]: each row's in ``feature``; None: its own."""
        residual, _ = self._stream(batch, feature, pool, parent, None)
        if self.norm is None:
            return residual, residual
        hidden = self.normed(residual, self.norm, batch.num_rows)
        return hidden, hidden if self.config.norm_output else residual

    def draft(self, batch: RowBatch, feature: Tensor, pool: KVPool, parent: Tensor, out: Tensor) -> Tensor:
        """``forward`` and ``logits`` of its hidden rows into ``out``; returns the features. A last norm that only lm_head reads is deferred (ops.linear)."""
        if self.norm is None or self.config.norm_output:
            hidden, following = self.forward(batch, feature, pool, parent)
            self.logits(hidden, batch.num_rows, out)
            return following
        residual, normed = self._stream(batch, feature, pool, parent, self.norm)
        self.lm_head.normed(normed, batch.num_rows, out)
        return residual

    def keep(self, batch: RowBatch, feature: Tensor, pool: KVPool, place: Tensor, hidden: Tensor, following: Tensor | None) -> None:
        """``forward``, of which row r's outputs go to row place[r] (int32 [R], -1: to none) of hidden and following [B, h]."""
        residual, _ = self._stream(batch, feature, pool, None, None)
        ops.keep_rows(residual, self.norm, self.eps, place, batch.num_rows, hidden, following, self.config.norm_output)

    def _stream(self, batch: RowBatch, feature: Tensor, pool: KVPool, parent: Tensor | None, norm: Tensor | None) -> tuple[Tensor, Normed]:
        """The residual stream behind the last layer; with ``norm`` the first half of that RMSNorm of it too."""
        n, rows, c, eps = batch.num_rows, batch.rows, self.config.layers, self.eps
        if not batch.prefill:
            ops.attention_plan(batch.request, batch.prefix, batch.ancestors, batch.paths, n, batch.block_table.shape[0], c.num_heads, self.kv_heads,
                               batch.block_table.shape[1] * pool.page_size, pool.fp8, batch.workspace.plan)
        residual, x = self._enter(batch, feature, parent)
        allocate = torch.zeros if self.hidden_size % 256 else torch.empty  # what pads a row's sums is read
        squares = allocate(ops.squares_shape(rows, self.hidden_size), dtype=torch.float32, device=self.device)
        normed = Normed(self.new(rows, self.hidden_size), squares, eps)
        qkv = self.new(rows, (c.num_heads + 2 * self.kv_heads) * self.head_dim)
        q, attended = (self.new(rows, c.num_heads, self.head_dim) for _ in range(2))
        activated = self.new(rows, c.intermediate_size)
        for j, (layer, (k_pool, v_pool, *kv_scales)) in enumerate(zip(self.layers, pool.layers())):
            if j:
                layer.qkv.normed(normed, n, qkv)
            else:
                layer.qkv(x, n, qkv)
            ops.rope_append(qkv, batch.position, batch.slot, self.cos, self.sin, layer.q_norm, layer.k_norm, eps, n, q, k_pool, v_pool, *kv_scales)
            if batch.prefill:
                ops.prefill_attention(q, k_pool, v_pool, batch.block_table, batch.request, batch.prefix, self._scale, layer.window, n, attended, *kv_scales)
            else:
                ops.tree_attention(q, k_pool, v_pool, batch.block_table, batch.request, batch.prefix, batch.ancestors, batch.paths, self._scale, layer.window, n,
                                   batch.workspace.plan, batch.workspace.partials, attended, *kv_scales)
            layer.o.add(attended.flatten(1), n, residual, residual, layer.post_norm, normed)
            layer.gate_up.silu(normed, n, activated)
            layer.down.add(activated, n, residual, residual, self.layers[j + 1].input_norm if j + 1 < self.num_layers else norm, normed)
        return residual, normed

    def logits(self, hidden: Tensor, num_rows: Tensor, out: Tensor) -> None:
        """Raw logits of hidden rows [R, h] into float32 [R, D], ids of the head's vocabulary."""
        self.lm_head(hidden, num_rows, out)


class EagleModel(HeadModel):
    """EAGLE-1 and 2: fc over embedding and the target's final-normed state; no input norm in the first layer, no final norm, the target's lm_head (drafters.md 1)."""

    def __init__(self, weights: HeadWeights):
        super().__init__(weights)
        self._norms = [weights.vector(name) for name in ("embedding_layernorm", "hidden_states_layernorm")] if self.config.input_norms else [None, None]

    def _enter(self, batch: RowBatch, feature: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = self.new(batch.rows, self.hidden_size)
        self.fc(self._joined(batch, feature, parent, *self._norms), batch.num_rows, residual)
        return residual, residual


class Eagle3Model(HeadModel):
    """EAGLE-3 and 3.1: fc over captured boundaries, once a feature of the target; q, k and v of embedding and feature side by side (drafters.md 3, 4)."""

    def __init__(self, weights: HeadWeights):
        super().__init__(weights)
        c = self.config
        self._hidden_norm = weights.vector("layers.0.hidden_norm")
        self._chunk_norms = [weights.vector(f"fc_norm.{j}") for j in range(c.num_aux)] if c.fc_norm and c.use_aux else []
        self._input_norm = weights.vector("input_norm") if c.norm_before_fc and c.use_aux else None

    def combine(self, features: list[Tensor], num_rows: Tensor, source: Tensor | None = None) -> Tensor:
        if self.fc is None:
            return super().combine(features, num_rows, source)
        joined = self._gathered(features, self._chunk_norms, self.eps, num_rows, source)
        if self._input_norm is not None:
            joined = self.normed(joined, self._input_norm, num_rows)
        out = self.new(joined.shape[0], self.hidden_size)
        self.fc(joined, num_rows, out)
        return out

    def _enter(self, batch: RowBatch, feature: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = self.new(batch.rows, self.hidden_size)
        joined = self._joined(batch, feature, parent, self.layers[0].input_norm, self._hidden_norm, stream=residual, stream_normed=self.config.norm_before_residual)
        return residual, joined


class PEagleModel(Eagle3Model):
    """P-EAGLE: EAGLE-3 with a learned feature for slots whose true one is not known (drafters.md 5), so that all drafts come out of one pass."""

    def __init__(self, weights: HeadWeights):
        super().__init__(weights)
        self.missing = weights.raw("mask_hidden").flatten()
        #: [1, h]: the feature of such a slot, through norms and fc like any other.
        self.mask_feature = self.combine(list(self.missing.view(self.config.num_aux, 1, -1)), torch.ones(1, dtype=torch.int32, device=self.device))


class MtpModel(HeadModel):
    """MTP of dense models: a projection of the normed state and the normed embedding (MiMo; in speculators' form the embedding is first), one decoder layer, a final norm whose
    output is the lm_head's input and the next slot's feature (drafters.md 7)."""

    def __init__(self, weights: HeadWeights):
        super().__init__(weights)
        self._token_norm, self._hidden_norm = weights.vector("token_layernorm"), weights.vector("hidden_layernorm")

    def _enter(self, batch: RowBatch, feature: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = self.new(batch.rows, self.hidden_size)
        self.fc(self._joined(batch, feature, parent, self._token_norm, self._hidden_norm, feature_first=not self.config.embedding_first), batch.num_rows, residual)
        return residual, self.normed(residual, self.layers[0].input_norm, batch.num_rows)


def load_head(head: Head, target: DenseModel, quantization: str | None = None) -> HeadModel:
    """ValueError if there are no kernels for the head's shape."""
    return {"eagle": EagleModel, "eagle3": Eagle3Model, "peagle": PEagleModel, "mtp": MtpModel}[head.config.family](HeadWeights(head, target, quantization))

"""HeadNetwork: the networks of EAGLE-3, P-EAGLE and MTP heads under autograd, every slot of a batch of texts unrolled as the runtime's chain is (training.md 1).

Slot i takes the feature of token i and token i + 1 and stands at position i. Step s of the unrolling is, for all slots at once, what the runtime does s drafts behind slot i: the token
is i + 1 + s, the feature the head's own last output, the position i + s, and the keys it sees are those of step 0 up to slot i, and its own slot's of the steps since (the
diagonal). So slot i at step s says token i + s + 2. Parameters have the names of weights/head.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from specrt.layers.rope import rope_tables
from specrt.models.config import ModelConfig
from specrt.weights.head import Head
from specrt.weights.head_config import HeadConfig

Keys = list[tuple[Tensor, Tensor]]  # keys and values of each step so far, [B, Hkv, T, D]


class Norm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class FeatureLinear(nn.Linear):
    """fc of EAGLE-3 heads. Dimensions of the residual stream differ by three orders (SmolLM2: 372 beside 1), where no one rate fits: ``scale`` [inputs] divides them and the
    weight is held times it, which is the same function."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias)
        self.register_buffer("scale", torch.ones(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x / self.scale).to(x.dtype))

    @torch.no_grad()
    def precondition(self, inputs: Tensor, new: bool) -> None:
        """scale becomes the RMS of each dimension of ``inputs`` [N, inputs]. The function stays; but ``new`` weights are taken as of the scaled inputs, for outputs of RMS 1."""
        self.scale.copy_(inputs.float().square().mean(0).sqrt().clamp_min(1e-6))
        self.weight.mul_(1 / self.weight.square().sum(1, keepdim=True).sqrt() if new else self.scale)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class DecoderLayer(nn.Module):
    """inputs: the width that q, k and v take (twice the hidden size in EAGLE-3's first layer)."""

    def __init__(self, c: ModelConfig, index: int, inputs: int, input_norm: bool = True, hidden_norm: bool = False):
        super().__init__()
        h, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.config, self.window = c, c.windows[index]
        attention = {"q_proj": nn.Linear(inputs, q, c.attention_bias), "k_proj": nn.Linear(inputs, kv, c.attention_bias), "v_proj": nn.Linear(inputs, kv, c.attention_bias),
                     "o_proj": nn.Linear(q, h, c.o_bias)}
        if c.qk_norm:
            attention |= {"q_norm": Norm(c.head_dim, c.rms_norm_eps), "k_norm": Norm(c.head_dim, c.rms_norm_eps)}
        self.self_attn = nn.ModuleDict(attention)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(h, c.intermediate_size, c.mlp_bias), "up_proj": nn.Linear(h, c.intermediate_size, c.mlp_bias),
                                  "down_proj": nn.Linear(c.intermediate_size, h, c.mlp_bias)})
        self.post_attention_layernorm = Norm(h, c.rms_norm_eps)
        if input_norm:
            self.input_layernorm = Norm(h, c.rms_norm_eps)
        if hidden_norm:
            self.hidden_norm = Norm(h, c.rms_norm_eps)

    def forward(self, x: Tensor, residual: Tensor, keys: Keys, cos: Tensor, sin: Tensor, slot: Tensor) -> Tensor:
        """x: the (normed) input of q, k and v; slot: of each row. Adds this step's keys to ``keys``."""
        residual = residual + self.self_attn["o_proj"](self._attend(x, keys, cos, sin, slot))
        y = self.post_attention_layernorm(residual)
        return residual + self.mlp["down_proj"](functional.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))

    def _attend(self, x: Tensor, keys: Keys, cos: Tensor, sin: Tensor, slot: Tensor) -> Tensor:
        c, (b, t, _) = self.config, x.shape
        q, k, v = (self.self_attn[f"{n}_proj"](x).view(b, t, -1, c.head_dim).transpose(1, 2) for n in "qkv")
        if c.qk_norm:
            q, k = self.self_attn["q_norm"](q), self.self_attn["k_norm"](k)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        keys.append((k, v))
        step, (k0, v0) = len(keys) - 1, keys[0]
        q = q.reshape(b, c.num_kv_heads, -1, t, c.head_dim) * c.head_dim**-0.5  # the group of a key head side by side
        slots = k0.shape[2]
        row, column = slot[..., None], torch.arange(slots, device=x.device)
        seen = (column <= row) & ((row + step - column < self.window) if self.window else True)
        scores = [(q @ k0[:, :, None].transpose(-1, -2)).masked_fill(~seen, -torch.inf)]
        own = [r for r in range(1, step + 1) if not self.window or step - r < self.window]
        scores += [(q * keys[r][0][:, :, None]).sum(-1, keepdim=True) for r in own]
        p = torch.softmax(torch.cat(scores, -1), -1, dtype=torch.float32).to(v.dtype)
        out = p[..., :slots] @ v0[:, :, None]
        for i, r in enumerate(own):
            out = out + p[..., slots + i, None] * keys[r][1][:, :, None]
        return out.flatten(1, 2).transpose(1, 2).reshape(b, t, -1)


class HeadNetwork(nn.Module):
    """embedding [V, h], target_lm_head [V, h] and target_norm [Ht] are frozen, of the target; mask_token: P-EAGLE's."""

    def __init__(self, config: HeadConfig, embedding: Tensor, target_lm_head: Tensor, target_norm: Tensor, target_eps: float, mask_token: int | None = None):
        super().__init__()
        c, h = config.layers, config.layers.hidden_size
        self.config, self.mask_token, self.target_eps = config, mask_token, target_eps
        three = config.like_eagle3
        if config.fc_inputs:
            self.fc = (FeatureLinear if three else nn.Linear)(config.fc_inputs, h, config.fc_bias)
        if three:
            layers = [DecoderLayer(c, i, 2 * h if i == 0 else h, hidden_norm=i == 0) for i in range(c.num_layers)]
            if config.use_aux and config.fc_norm:
                self.fc_norm = nn.ModuleList(Norm(config.target_hidden_size, c.rms_norm_eps) for _ in range(config.num_aux))
            if config.use_aux and config.norm_before_fc:
                self.input_norm = Norm(config.fc_inputs, c.rms_norm_eps)
            if config.family == "peagle":
                self.mask_hidden = nn.Parameter(torch.zeros(config.fc_inputs))
        else:
            layers = [DecoderLayer(c, i, h) for i in range(c.num_layers)]
            self.token_layernorm, self.hidden_layernorm = Norm(h, c.rms_norm_eps), Norm(config.target_hidden_size, c.rms_norm_eps)
        self.layers, self.norm = nn.ModuleList(layers), Norm(h, c.rms_norm_eps)
        if config.own_lm_head:
            self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        for name, value in (("embedding", embedding), ("target_lm_head", None if config.own_lm_head else target_lm_head), ("target_norm", target_norm)):
            self.register_buffer(name, value, persistent=False)

    def combine(self, features: Tensor) -> Tensor:
        """A slot's feature [..., h] from the target's captured boundaries side by side [..., n Ht]."""
        return rms_norm(features, self.target_norm, self.target_eps) if self.config.final_feature else self.fc(self._normed(features))

    def _normed(self, features: Tensor) -> Tensor:
        if self.config.fc_norm:
            return torch.cat([norm(f) for norm, f in zip(self.fc_norm, features.chunk(self.config.num_aux, -1))], -1)
        return self.input_norm(features) if self.config.norm_before_fc else features

    def precondition(self, features: Tensor, new: bool) -> None:
        """Before training: fc for features [N, n Ht] such as these; new: its weights are random yet."""
        if not self.config.final_feature:
            self.fc.precondition(self._normed(features), new)

    def published(self) -> dict[str, Tensor]:
        """The weights, under the names of weights/head.py."""
        weights = {name: p.detach() for name, p in self.named_parameters()}
        return weights if self.config.final_feature else weights | {"fc.weight": weights["fc.weight"] / self.fc.scale}

    def unroll(self, ids: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
        """Hidden rows [B, T, h] for ``logits``, step by step. ids [B, T]: texts, padded at their ends; features [B, T, n Ht]."""
        c, t = self.config.layers, ids.shape[1]
        cos, sin = rope_tables(c.head_dim, c.rope_theta, c.rope_scaling, t + steps, ids.device)
        slot = torch.arange(t, device=ids.device)
        keys: list[Keys] = [[] for _ in self.layers]
        feature = self.combine(features)
        if self.config.family == "peagle":
            masked = self.combine(self.mask_hidden.to(features.dtype)).expand_as(feature)
        for s in range(steps):
            token = functional.pad(ids[:, s + 1 :], (0, min(s + 1, t)))
            if s and self.config.family == "peagle":
                token, feature = torch.full_like(ids, self.mask_token), masked
            hidden, feature = self._slots(self.embedding[token].to(feature.dtype), feature, keys, cos[s : s + t], sin[s : s + t], slot)
            yield hidden

    def chains(self, ids: Tensor, features: Tensor, slots: Tensor, steps: int, draw: Callable[[Tensor], Tensor]) -> None:
        """As ``unroll``, for C chains a text that go on by themselves from slots [B, C]: ``draw`` gets each step's logits [B, C, D] and says which tokens [B, C] come next."""
        c, t = self.config.layers, ids.shape[1]
        cos, sin = rope_tables(c.head_dim, c.rope_theta, c.rope_scaling, t + steps, ids.device)
        keys: list[Keys] = [[] for _ in self.layers]
        feature = self.combine(features)
        rows = self._slots(self.embedding[functional.pad(ids[:, 1:], (0, 1))].to(feature.dtype), feature, keys, cos[:t], sin[:t], torch.arange(t, device=ids.device))
        hidden, feature = (x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1])) for x in rows)
        token = draw(self.logits(hidden, 0))
        for s in range(1, steps):
            at = slots + s
            hidden, feature = self._slots(self.embedding[token].to(feature.dtype), feature, keys, cos[at][:, None], sin[at][:, None], slots[:, None, None])
            token = draw(self.logits(hidden, s))

    def _slots(self, embedded: Tensor, feature: Tensor, keys: list[Keys], cos: Tensor, sin: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden rows, features for the next step)."""
        first = self.layers[0]
        if self.config.like_eagle3:
            hidden = first.hidden_norm(feature)
            x, residual = torch.cat([first.input_layernorm(embedded), hidden], -1), hidden if self.config.norm_before_residual else feature
        else:
            pair = self.hidden_layernorm(feature), self.token_layernorm(embedded)
            residual = self.fc(torch.cat(pair[::-1] if self.config.embedding_first else pair, -1))
            x = first.input_layernorm(residual)
        for i, layer in enumerate(self.layers):
            residual = layer(layer.input_layernorm(residual) if i else x, residual, keys[i], cos, sin, slot)
        hidden = self.norm(residual)
        return hidden, hidden if self.config.norm_output else residual

    def logits(self, hidden: Tensor, step: int) -> Tensor:
        """Over the head's vocabulary, in the dtype of the products."""
        weight = self.lm_head.weight if self.config.own_lm_head else self.target_lm_head
        return functional.linear(hidden, weight.to(hidden.dtype))


def head_network(head: Head, embedding: Tensor, lm_head: Tensor, norm: Tensor, eps: float) -> HeadNetwork:
    """The network of an opened head, with its weights in float32; embedding, lm_head and norm: the target's. ValueError for a family that is not trained here."""
    c = head.config
    if c.family == "eagle":
        raise ValueError(f"head {head.origin!r} is an EAGLE-1 head, which can be used but not trained; trained are eagle3, peagle, mtp and medusa")
    if head.own_embedding:
        own = head.tensors.get("embed_tokens.weight").to(embedding)
        embedding = functional.pad(own, (0, 0, 0, max(embedding.shape[0] - own.shape[0], 0)))  # rows that pad the target's vocabulary
        if c.tie_word_embeddings and not c.own_lm_head:
            lm_head = own
    if c.family == "peagle" and c.mask_token_id is None:
        raise ValueError(f"head {head.origin!r}: its config.json has no mask_token_id, the id of its mask slots' token; write it there")
    network = HeadNetwork(c, embedding, lm_head, norm, eps, c.mask_token_id)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(head.tensors.get(name).view_as(parameter))
    return network

"""Settings of a training run, every one checked. Without torch: the shell's flags are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specrt.checks import choice, integer, number, refuse

METHODS = ("eagle3", "eagle3.1", "peagle", "mtp", "medusa")
OBJECTIVES = ("ce", "lk", "length", "vsd")
_DRAWN = ("eagle3", "eagle3.1", "mtp")  # whose drafts depend on those before them
_VSD_LR = 5e-6
#: unroll, decay, lr, layers of a method; heads of MEDUSA are its unrolled steps.
_DEFAULTS = {"eagle3": (7, 0.8, 1e-4, 1), "eagle3.1": (7, 0.8, 1e-4, 1), "peagle": (5, 1.0, 6e-4, 2), "mtp": (3, 0.6, 1e-4, 1), "medusa": (4, 0.8, 1e-3, 1)}


@dataclass(frozen=True)
class Settings:
    """method: of METHODS; "eagle3.1" is eagle3 with fc_norm and norm_output. data: files of ``specrt train capture``. init_from: a head to go on from, whose shape and vocabulary
    stay; else draft_vocab_size (None: the target's), layers, intermediate_size (None: the target's), layer_ids (None: [2, L/2, L-3]) and the norm flags make a new one.
    unroll: steps of the training-time test (P-EAGLE's depths, MEDUSA's heads); decay: weight of each against the one before. batch_tokens: padded positions a step; max_length:
    texts are cut to it. warmup: share of all steps. held_out: prompts kept from training, on which the acceptance length is measured every eval_every steps (None: each epoch)
    with chains of draft_tokens and answers of eval_tokens; patience: measurements without a better one that end the run."""

    method: str
    model: str
    data: tuple[str, ...]
    output: str
    init_from: str | None = None
    device: str | None = None
    dtype: str = "bfloat16"
    objective: str = "ce"
    unroll: int | None = None
    decay: float | None = None
    draft_vocab_size: int | None = None
    layers: int | None = None
    intermediate_size: int | None = None
    layer_ids: tuple[int, ...] | None = None
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    mask_token_id: int | None = None
    lr: float | None = None
    warmup: float = 0.03
    clip: float = 0.5
    weight_decay: float = 0.0
    epochs: int = 10
    batch_tokens: int = 8192
    max_length: int = 2048
    seed: int = 0
    held_out: int = 32
    eval_every: int | None = None
    eval_tokens: int = 128
    draft_tokens: int = 4
    patience: int = 3
    license: str = "apache-2.0"

    @classmethod
    def make(cls, given: dict[str, Any]) -> Settings:
        """Fills in what the method's defaults are. ValueError names the setting, its value and what would be accepted."""
        given = {key: value for key, value in given.items() if value is not None}
        s = cls(**given)
        choice("method", s.method, METHODS)
        choice("objective", s.objective, OBJECTIVES)
        choice("dtype", s.dtype, ["bfloat16", "float32"])
        unroll, decay, lr, layers = _DEFAULTS[s.method]
        if s.objective == "vsd":
            decay, lr = 1.0, _VSD_LR
        filled = {"unroll": unroll, "decay": decay, "lr": lr} | ({} if s.init_from else {"layers": layers}) | given
        if s.method == "eagle3.1" and not s.init_from:
            filled |= {"fc_norm": not s.norm_before_fc, "norm_output": True}
        s = cls(**filled)
        for name, low, high in (("unroll", 1, 16), ("epochs", 1, None), ("batch_tokens", 64, None), ("max_length", 4, None), ("held_out", 1, None), ("eval_tokens", 2, None),
                                ("draft_tokens", 1, 16), ("patience", 1, None), ("seed", 0, None), ("layers", 1, None), ("draft_vocab_size", 16, None),
                                ("intermediate_size", 16, None), ("eval_every", 1, None), ("mask_token_id", 0, None)):
            if getattr(s, name) is not None:
                integer(name, getattr(s, name), low, high)
        for name, low, high, accepted in (("lr", 1e-9, 1.0, "a number > 0, at most 1"), ("decay", 0.01, 1.0, "a number from 0.01 to 1"), ("warmup", 0.0, 1.0, "a share from 0 to 1"),
                                          ("clip", 1e-6, 1e6, "a number > 0"), ("weight_decay", 0.0, 1.0, "a number from 0 to 1")):
            number(name, getattr(s, name), low, high, accepted)
        s._check_shape(given)
        s._check_objective()
        return s

    def _check_objective(self) -> None:
        if self.objective != "vsd":
            return
        if self.init_from is None:
            raise ValueError("objective = 'vsd' learns from what the head drafts, and a new head drafts noise; give init_from, a head trained for 'ce', 'lk' or 'length'")
        if self.method not in _DRAWN:
            raise ValueError(f"objective = 'vsd' is of heads whose drafts depend on those before them, and method {self.method!r} has none such; it must be one of {', '.join(map(repr, _DRAWN))}")
        if self.decay != 1 or self.unroll < 2:
            raise ValueError(f"objective = 'vsd' weighs whole chains, of two tokens or more: decay = {self.decay:g} must be left out, and unroll = {self.unroll} be at least 2")

    def _check_shape(self, given: dict[str, Any]) -> None:
        shape = ("draft_vocab_size", "layers", "intermediate_size", "layer_ids", "fc_norm", "norm_before_fc", "norm_before_residual", "norm_output", "mask_token_id")
        for name in shape:
            if self.init_from and given.get(name):
                raise ValueError(f"{name} = {given[name]!r} does not go with init_from, whose head has its own; leave one of them out")
        of_eagle3 = shape[3:8]
        for name in of_eagle3:
            if self.method in ("mtp", "medusa") and given.get(name):
                raise ValueError(f"{name} is of EAGLE-3's network, and method {self.method!r} has none; leave it out")
        if self.method == "mtp" and (given.get("draft_vocab_size") or given.get("layers", 1) != 1):
            raise ValueError("an MTP module has one layer and the target's vocabulary; leave draft_vocab_size and layers out")
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm (a norm for each captured chunk) and norm_before_fc (one norm over all of them) exclude each other")
        if given.get("mask_token_id") is not None and self.method != "peagle":
            raise ValueError(f"mask_token_id is of P-EAGLE heads, and the method is {self.method!r}; leave it out")
        if self.method == "peagle" and self.mask_token_id is None and not self.init_from:
            raise refuse("mask_token_id", None, "the id of a token that texts do not have, for the mask slots of a new P-EAGLE head")
        if self.draft_tokens > self.unroll and self.method in ("peagle", "medusa"):
            raise ValueError(f"draft_tokens = {self.draft_tokens} is more than the {self.unroll} that are trained (unroll)")

    @property
    def family(self) -> str:
        """The method's name in speculative_config."""
        return "eagle3" if self.method == "eagle3.1" else self.method

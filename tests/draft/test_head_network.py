"""The networks of heads against an independent float64 reading of the formulas, for every combination of flags, and in bits against themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from specrt import ops
from specrt.cache.pool import KVPool
from specrt.layers.batch import RowBatch
from specrt.models.config import ModelConfig
from specrt.models.dense import DenseModel
from specrt.models.head import HeadModel, load_head
from specrt.weights.head import open_head
from tests.kit.compare import assert_bits, assert_close, poisoned, relative_error, rows
from tests.kit.heads import MASK, Reference, Shape, head_tensors, original_config, random_head, speculators_config, write_head
from tests.kit.tiny import CONFIGS, random_checkpoint

TRUE, DRAFTED, PAGE = 21, 5, 16
GENERATOR = torch.Generator().manual_seed(3)
TOKENS = torch.randint(0, 300, (TRUE + DRAFTED,), generator=GENERATOR).tolist()
FEATURES = [torch.randn(TRUE, 128, generator=GENERATOR) for _ in range(3)]


class HeadRun:
    """One request's slots of a head, in pages of its own."""

    def __init__(self, model: HeadModel):
        self.model, device, pages = model, model.device, 8
        model.size(pages * PAGE)
        self.pool = KVPool(model.num_layers, pages + 1, model.kv_heads, PAGE, model.head_dim, model.kv_dtype, device)
        self.pool.k.fill_(float("nan"))
        self.pool.v.fill_(float("nan"))
        self.table = (torch.randperm(pages, dtype=torch.int32) + 1)[None].to(device)
        self.workspace = ops.attention_workspace(64, model.config.layers.num_heads, model.head_dim, pages * PAGE, device)

    def slots(self, tokens: list[int], start: int, feature: Tensor | list[Tensor], prefill: bool = False) -> tuple[Tensor, Tensor]:
        """(logits, next features) of slots start.., each seeing those before it. feature: the head's own, or the target's boundaries."""
        device = self.model.device
        position = torch.arange(start, start + len(tokens), dtype=torch.int32, device=device)
        n = rows(len(tokens), device)
        batch = RowBatch(token=torch.tensor(tokens, dtype=torch.int32, device=device), position=position, request=torch.zeros_like(position), prefix=position + 1,
                         slot=self.table[0, (position // PAGE).long()].long() * PAGE + position % PAGE, num_rows=n, block_table=self.table, workspace=self.workspace,
                         prefill=prefill)
        feature = self.model.combine([f.to(device=device, dtype=self.model.dtype) for f in feature], n) if isinstance(feature, list) else feature.clone()
        hidden, following = self.model.forward(batch, feature, self.pool)
        out = poisoned(len(tokens), self.model.vocab, dtype=torch.float32, device=device)
        self.model.logits(hidden, n, out)
        return out, following.clone()

    def chain(self) -> Tensor:
        """Logits of all slots: TRUE ones with the target's features, then DRAFTED with the head's own."""
        features = FEATURES[: self.model.config.num_aux] if not self.model.config.final_feature else FEATURES[:1]
        logits, feature = self.slots(TOKENS[:TRUE], 0, features, prefill=True)
        found, feature = [logits], feature[-1:]
        for i in range(TRUE, TRUE + DRAFTED):
            logits, feature = self.slots([TOKENS[i]], i, feature)
            found.append(logits)
        return torch.cat(found)


def reference_chain(reference: Reference) -> Tensor:
    s, past, found = reference.shape, [], []
    for i, token in enumerate(TOKENS):
        if i < TRUE:
            feature = reference.combine([f[i] for f in (FEATURES[: s.num_aux] if s.family == "eagle3" and s.use_aux else FEATURES[:1])])
        logits, feature, past = reference.slot(token, feature, i, past)
        found.append(logits)
    return torch.stack(found)


def target_of(device, dtype=torch.float32) -> DenseModel:
    return DenseModel.load(random_checkpoint("llama"), dtype, device)


def reference_of(s: Shape, tensors: dict[str, Tensor]) -> Reference:
    source = random_checkpoint("llama").tensors
    return Reference(s, tensors, *(source.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")))


FLAGS = [dict(norm_before_residual=a, norm_output=b, **c) for a, b, c in product([False, True], [False, True], [{}, {"fc_norm": True}, {"norm_before_fc": True}])]
EAGLE3 = [Shape(**flags) for flags in FLAGS] + [
    Shape(use_aux=False), Shape(use_aux=False, norm_output=True), Shape(layers=3), Shape(layers=2, norm_before_residual=True, fc_norm=True, norm_output=True), Shape(qk_norm=True, layers=2),
    Shape(bias=True, fc_bias=True), Shape(own_embedding=True), Shape(draft=None), Shape(draft=None, own_lm_head=False), Shape(num_aux=2), Shape(heads=2, kv_heads=1, head_dim=96),
    Shape(hidden=192, own_embedding=True), Shape(theta=500000.0)]
EAGLE = [Shape("eagle"), Shape("eagle", fc_bias=True), Shape("eagle", input_norms=True), Shape("eagle", input_norms=True, fc_bias=True), Shape("eagle", own_embedding=True, fc_bias=True), Shape("eagle", layers=2)]

PEAGLE = [Shape("peagle", **flags) for flags in FLAGS]
MTP = [Shape("mtp"), Shape("mtp", bias=True), Shape("mtp", qk_norm=True, heads=2, kv_heads=1), Shape("mtp", qk_norm=True, embedding_first=True)]


def name_of(s: Shape) -> str:
    default = Shape(s.family)
    return "-".join([s.family, *(f"{k}={v}" for k, v in vars(s).items() if v != getattr(default, k))])


@pytest.mark.parametrize("s", EAGLE3 + EAGLE + MTP, ids=name_of)
def test_logits_are_those_of_the_formulas(device, tmp_path, s):
    model = load_head(open_head(str(random_head(tmp_path, s, list(range(2, 2 + s.num_aux)) if s.num_aux != 3 else None))), target_of(device))
    assert_close(HeadRun(model).chain(), reference_chain(reference_of(s, head_tensors(s))), 1e-4)


@pytest.mark.parametrize("flag", ["norm_before_residual", "fc_norm", "norm_before_fc", "norm_output", "input_norms", "embedding_first"])
def test_every_flag_matters(tmp_path, flag):
    """So that a flag that was not read could not pass."""
    s = Shape({"input_norms": "eagle", "embedding_first": "mtp"}.get(flag, "eagle3"))
    tensors = head_tensors(replace(s, **{flag: True}))
    with_, without = (reference_chain(reference_of(t, tensors)) for t in (replace(s, **{flag: True}), s))
    assert relative_error(without, with_) > 0.01


def test_a_sliding_window_is_the_heads_own(device, tmp_path):
    s = Shape(layers=2, window=8)
    model = load_head(open_head(str(write_head(tmp_path, speculators_config(s), head_tensors(s)))), target_of(device))
    assert model.config.layers.windows == (8, 8)
    got = HeadRun(model).chain()
    assert_close(got, reference_chain(reference_of(s, head_tensors(s))), 1e-4)
    assert relative_error(got, reference_chain(reference_of(replace(s, window=0), head_tensors(s)))) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("s", [Shape(layers=2, fc_norm=True, norm_output=True), Shape("eagle", fc_bias=True), Shape("mtp", bias=True), Shape("mtp", qk_norm=True, embedding_first=True)], ids=name_of)
def test_slots_one_by_one_have_the_bits_of_one_pass(device, tmp_path, s, dtype):
    model = load_head(open_head(str(random_head(tmp_path, s))), target_of(device, dtype))
    features = FEATURES if s.family == "eagle3" else FEATURES[:1]
    whole = HeadRun(model).slots(TOKENS[:TRUE], 0, features, prefill=True)
    single, pieces = HeadRun(model), HeadRun(model)
    one = [single.slots([TOKENS[i]], i, [f[i : i + 1] for f in features]) for i in range(TRUE)]
    few = [pieces.slots(TOKENS[a:b], a, [f[a:b] for f in features], prefill=a == 0) for a, b in ((0, 7), (7, 8), (8, TRUE))]
    for part in (0, 1):
        assert not torch.isnan(whole[part]).any()
        assert_bits(torch.cat([x[part] for x in one]), whole[part])
        assert_bits(torch.cat([x[part] for x in few]), whole[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_fp8_head_stays_near(device, tmp_path, dtype):
    s = Shape(norm_output=True)
    head = open_head(str(random_head(tmp_path, s)))
    wide, narrow = (HeadRun(load_head(head, target_of(device, dtype), q)).chain() for q in (None, "fp8"))
    assert 1e-3 < relative_error(narrow, wide) < 0.15


@pytest.mark.parametrize("s", [*PEAGLE, Shape("peagle", layers=3, norm_output=True), Shape("peagle", fc_norm=True, draft=None), Shape("peagle", norm_before_fc=True, own_embedding=True)], ids=name_of)
def test_mask_slots_of_one_pass_are_those_of_the_formulas(device, tmp_path, s):
    model, tensors = load_head(open_head(str(random_head(tmp_path, s))), target_of(device)), head_tensors(s)
    run, reference, past = HeadRun(model), reference_of(s, tensors), []
    true, _ = run.slots(TOKENS[:TRUE], 0, FEATURES, prefill=True)
    for i in range(TRUE):
        want, _, past = reference.slot(TOKENS[i], reference.combine([f[i] for f in FEATURES]), i, past)
        assert_close(true[i], want, 1e-4)
    masked, _ = run.slots([MASK] * 4, TRUE, model.mask_feature.expand(4, -1))
    assert_close(masked, torch.stack(reference.masked(4, MASK, past)), 1e-4)


def test_an_embedding_like_the_targets_is_shared(tmp_path):
    target = target_of("cpu")
    tensors = head_tensors(Shape())
    for i, own in enumerate([None, target.embedding.clone(), target.embedding + 1]):
        extra = {} if own is None else {"embed_tokens.weight": own}
        model = load_head(open_head(str(write_head(tmp_path / str(i), original_config(Shape()), tensors | extra))), target)
        assert (model.embedding is target.embedding) == (i < 2)


def test_a_tied_head_is_the_heads_embedding(device, tmp_path):
    s = Shape(draft=None, own_embedding=True, own_lm_head=False)
    tensors = head_tensors(s)
    model = load_head(open_head(str(write_head(tmp_path, original_config(s, tie_word_embeddings=True), tensors))), target_of(device))
    assert_close(HeadRun(model).chain(), reference_chain(reference_of(s, tensors | {"lm_head.weight": tensors["embed_tokens.weight"]})), 1e-4)


def test_the_target_config_is_what_the_shapes_fit():
    c = ModelConfig.from_hf(CONFIGS["llama"])
    assert (c.hidden_size, c.vocab_size, c.rms_norm_eps) == (Shape().target_hidden, Shape().vocab, 1e-5)

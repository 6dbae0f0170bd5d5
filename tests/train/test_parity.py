"""The trainer's networks are the runtime's: step 0 of the unrolling is what the runtime says after taking in true features, step s what it says s drafts down the chain."""

from __future__ import annotations

import pytest
import torch

from specrt.models.dense import DenseModel
from specrt.models.head import load_head
from specrt.models.medusa import MedusaModel
from specrt.train.medusa import MedusaNetwork
from specrt.train.network import HeadNetwork, head_network
from specrt.train.target import TargetRows
from specrt.weights.head import Head, open_head
from specrt.weights.medusa import open_medusa
from tests.draft.test_head_network import HeadRun, name_of
from tests.kit.compare import assert_bits, assert_close, rows
from tests.kit.forward import Sequence
from tests.kit.heads import MASK, Shape, head_tensors, random_head, speculators_config, write_head
from tests.kit.tiny import random_checkpoint

STEPS = 4
LENGTHS = (40, 23)  # of the texts of the batch
IDS = torch.zeros(2, 64, dtype=torch.int64)
for _row, _n in enumerate(LENGTHS):
    IDS[_row, :_n] = torch.randint(0, 300, (_n,), generator=torch.Generator().manual_seed(_row))
BOUNDARIES = (0, 1, 3)


@pytest.fixture(scope="module")
def target():
    return DenseModel.load(random_checkpoint("llama"), torch.float32, "cpu")


def network_of(head: Head) -> HeadNetwork:
    source = random_checkpoint("llama").tensors
    return head_network(head, *(source.get(n) for n in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")), 1e-5)


def features_of(target: DenseModel, boundaries: tuple[int, ...]) -> torch.Tensor:
    return TargetRows(target, boundaries, None).read(IDS)[0]


SHAPES = [Shape(norm_before_residual=a, norm_output=b, **c) for a in (False, True) for b in (False, True) for c in ({}, {"fc_norm": True}, {"norm_before_fc": True})]
SHAPES += [Shape(layers=2, norm_output=True), Shape(layers=2, window=8), Shape(qk_norm=True), Shape(bias=True, fc_bias=True), Shape(use_aux=False), Shape(own_embedding=True, draft=None),
           Shape(draft=None, own_lm_head=False), Shape("mtp"), Shape("mtp", bias=True), Shape("mtp", qk_norm=True, embedding_first=True),
           Shape("peagle", layers=2, fc_norm=True, norm_output=True), Shape("peagle", norm_before_fc=True),
           Shape("peagle", norm_before_residual=True, norm_output=True), Shape("peagle", layers=2, norm_before_residual=True, fc_norm=True)]


@pytest.mark.parametrize("s", SHAPES, ids=name_of)
def test_unrolled_steps_are_the_runtimes_extend_and_chain(tmp_path, target, s):
    folder = write_head(tmp_path, speculators_config(s), head_tensors(s)) if s.window else random_head(tmp_path, s)
    head = open_head(str(folder))
    boundaries = BOUNDARIES if not head.config.final_feature else (target.num_layers,)
    features, model = features_of(target, boundaries), load_head(head, target)
    with torch.no_grad():
        network = network_of(head)
        got = [network.logits(hidden, step) for step, hidden in enumerate(network.unroll(IDS, features, STEPS))]
    for row, length in enumerate(LENGTHS):
        ids, parts = IDS[row].tolist(), [f.contiguous() for f in features[row].split(target.config.hidden_size, -1)]
        whole, _ = HeadRun(model).slots(ids[1:length], 0, [f[: length - 1] for f in parts], prefill=True)
        assert_close(got[0][row, : length - 1], whole, 1e-4)
        for slot in (0, 7, length - STEPS - 2):
            run = HeadRun(model)
            _, following = run.slots(ids[1 : slot + 2], 0, [f[: slot + 1] for f in parts], prefill=True)
            feature = following[-1:]
            if s.family == "peagle":
                masked, _ = run.slots([MASK] * (STEPS - 1), slot + 1, model.mask_feature.expand(STEPS - 1, -1))
                assert_close(torch.stack([got[k][row, slot] for k in range(1, STEPS)]), masked, 1e-4)
                continue
            for step in range(1, STEPS):
                logits, feature = run.slots([ids[slot + step + 1]], slot + step, feature)
                assert_close(got[step][row, slot], logits[0], 1e-4)


@pytest.mark.parametrize("s", [Shape(), Shape(fc_norm=True), Shape("peagle", layers=2, norm_before_fc=True)], ids=name_of)
def test_preconditioning_keeps_the_function_and_what_is_written(tmp_path, target, s):
    head = open_head(str(random_head(tmp_path, s)))
    features = features_of(target, BOUNDARIES) * torch.logspace(-2, 2, 3 * target.config.hidden_size)
    network, plain = network_of(head), network_of(head)
    network.precondition(features.flatten(0, 1), new=False)
    with torch.no_grad():
        assert_close(network.combine(features), plain.combine(features).double(), 1e-5)
    for name, value in network.published().items():
        assert_close(value, plain.published()[name].double(), 1e-6)
    network.precondition(features.flatten(0, 1), new=True)
    with torch.no_grad():
        out = network.combine(features)
    assert 0.3 < out.square().mean().sqrt() < 3


def test_steps_of_medusa_are_its_heads(tmp_path, target):
    h, d = 128, 100
    tensors = {f"blocks.{j}.layers.0.{n}": 0.1 * torch.randn(shape) for j in range(3) for n, shape in (("weight", (h, h)), ("bias", (h,)))}
    tensors |= {f"lm_heads.{j}.weight": torch.randn(d, h) for j in range(3)} | {"token_map": torch.arange(0, 300, 3)}
    head = open_medusa(str(write_head(tmp_path, {"model_type": "medusa"}, tensors)))
    features, model = features_of(target, (target.num_layers,)), MedusaModel(head, target)
    with torch.no_grad():
        network = MedusaNetwork(head, target.norm, 1e-5)
        got = [network.logits(hidden, step) for step, hidden in enumerate(network.unroll(IDS, features, 3))]
    flat, n = features.flatten(0, 1), rows(features.shape[0] * features.shape[1], "cpu")
    for j in range(3):
        out = torch.empty(len(flat), d)
        model.logits(j, model.state(flat, n), n, out)
        assert_close(got[j].flatten(0, 1), out, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_features_are_the_runtimes(device, dtype):
    """To the bit, however the texts stand in the batch; and so are the logits to learn from."""
    target = DenseModel.load(random_checkpoint("llama"), dtype, device)
    ids = torch.arange(0, 300, 7)
    reader = TargetRows(target, BOUNDARIES, ids)
    features, states = reader.read(IDS.to(device))
    for row, length in enumerate(LENGTHS):
        want = {j: torch.empty(length, 128, dtype=dtype, device=device) for j in BOUNDARIES}
        logits = Sequence(target).prefill(IDS[row, :length].tolist(), want)
        assert_bits(features[row, :length], torch.cat(list(want.values()), 1))
        logp, inside = reader.teach(states[row, :length])
        assert_close(logp, torch.log_softmax(logits, -1)[:, ids.to(device)], 1e-5)
        assert inside.tolist() == [int(x) % 7 == 0 for x in logits.argmax(-1)]

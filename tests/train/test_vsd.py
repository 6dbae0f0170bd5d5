"""The objective vsd: chains that a head draws by itself. Its laws by enumeration in float64, with wrong variants that must be caught; the chains against the unrolled network (which
test_parity.py compares with the runtime) and against plain passes of the target; whole runs."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from specrt import LLM, SamplingParams
from specrt.models.dense import DenseModel
from specrt.train import objectives
from specrt.train.batches import make_batch
from specrt.train.chains import draw_chains, places
from specrt.train.objectives import accepted_lengths, vsd_loss
from specrt.train.samples import Sample
from specrt.train.settings import Settings
from specrt.train.target import TargetRows
from specrt.train.trainer import Trainer
from specrt.weights.head import open_head
from tests.kit.compare import assert_bits, assert_close
from tests.kit.heads import Shape, head_tensors, random_head, speculators_config, write_head
from tests.kit.tiny import random_checkpoint
from tests.train.test_parity import BOUNDARIES, IDS, LENGTHS, network_of
from tests.train.test_trainer import EAGLE3, data, settings, target  # noqa: F401  fixtures

pytestmark = pytest.mark.filterwarnings("ignore:head .*")

VOCAB, DEPTH, CHAINS = 3, 2, 2
PATHS = list(itertools.product(range(VOCAB), repeat=DEPTH))


# --- the law: every chain of a tiny vocabulary ---


def tables(seed: int) -> dict[tuple, torch.Tensor]:
    """Logits after every prefix of a chain, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {prefix: torch.randn(VOCAB, generator=generator, dtype=torch.float64) for n in range(DEPTH) for prefix in itertools.product(range(VOCAB), repeat=n)}


def along(logits: dict[tuple, torch.Tensor], path: tuple) -> torch.Tensor:
    """Log-probabilities of a path's tokens."""
    return torch.stack([torch.log_softmax(logits[path[:i]], 0)[token] for i, token in enumerate(path)])


def expected_by_rejection(p: dict[tuple, torch.Tensor], q: dict[tuple, torch.Tensor]) -> float:
    """How many drafts the ratio test keeps: token by token, with the chance to come so far and be drawn and kept."""
    def kept_from(prefix: tuple, chance: float) -> float:
        if len(prefix) == DEPTH:
            return 0.0
        drawn, wanted = torch.softmax(q[prefix], 0), torch.softmax(p[prefix], 0)
        total = 0.0
        for token in range(VOCAB):
            reached = chance * float(drawn[token]) * min(1.0, float(wanted[token] / drawn[token]))
            total += reached + kept_from((*prefix, token), reached)
        return total
    return kept_from((), 1.0)


def check_accepted_lengths() -> None:
    """The expectation over chains drawn from q is what exact sampling accepts."""
    for seed in range(5):
        p, q = tables(seed), tables(seed + 100)
        logq, logp = torch.stack([along(q, z) for z in PATHS]), torch.stack([along(p, z) for z in PATHS])
        mean = float((logq.sum(1).exp() * objectives.accepted_lengths(logq, logp)).sum())
        assert mean == pytest.approx(expected_by_rejection(p, q), abs=1e-12)


def check_gradient() -> None:
    """The expected gradient of the loss, over all draws of CHAINS chains, against central differences of what it is to descend: the cross entropy of the visited nodes as it is,
    minus the log-likelihood of the chains under the head, weighed by a softmax of what is accepted of them; who was drawn and their weights held fixed."""
    p, q = tables(1), tables(101)
    draws = list(itertools.product(PATHS, repeat=CHAINS))

    def ce_along(logits: dict[tuple, torch.Tensor], path: tuple) -> torch.Tensor:
        return torch.stack([-(torch.softmax(p[path[:i]], 0) * torch.log_softmax(logits[path[:i]], 0)).sum() for i in range(DEPTH)])

    fixed = []  # chance and weights of each draw, in plain arithmetic
    for draw in draws:
        chance, lengths = 1.0, []
        for path in draw:
            length, alive = 0.0, 1.0
            for i, token in enumerate(path):
                drawn, wanted = float(torch.softmax(q[path[:i]], 0)[token]), float(torch.softmax(p[path[:i]], 0)[token])
                chance *= drawn
                alive *= min(1.0, wanted / drawn)
                length += alive
            lengths.append(length)
        total = sum(2.718281828459045**x for x in lengths)
        fixed.append((chance, [2.718281828459045**x / total for x in lengths]))

    def descended(logits: dict[tuple, torch.Tensor]) -> float:
        return sum(chance * (sum(float(ce_along(logits, z).sum()) for z in draw) / CHAINS - sum(w * float(along(logits, z).sum()) for w, z in zip(weights, draw)))
                   for draw, (chance, weights) in zip(draws, fixed))

    trained = {prefix: t.clone().requires_grad_() for prefix, t in q.items()}
    for draw, (chance, _) in zip(draws, fixed):
        logq, logp, ce = (torch.stack([f(z) for z in draw])[None] for f in (lambda z: along(trained, z), lambda z: along(p, z), lambda z: ce_along(trained, z)))
        (chance * objectives.vsd_loss(logq, logp, ce)).backward()
    for prefix, at in itertools.product(q, range(VOCAB)):
        values = []
        for step in (1e-5, -1e-5):
            moved = {name: t.clone() for name, t in q.items()}
            moved[prefix][at] += step
            values.append(descended(moved))
        assert float(trained[prefix].grad[at]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)


def test_what_is_accepted_is_what_exact_sampling_accepts():
    check_accepted_lengths()


def test_the_expected_gradient_is_the_surrogates():
    check_gradient()


WRONG_LENGTHS = {"not clamped": lambda q, p: (p - q).cumsum(-1).exp().sum(-1), "the other way round": lambda q, p: accepted_lengths(p, q),
                 "without what came before": lambda q, p: (p - q).clamp(max=0).exp().sum(-1), "the whole chain or nothing": lambda q, p: (p - q).clamp(max=0).sum(-1).exp()}


@pytest.mark.parametrize("wrong", WRONG_LENGTHS)
def test_wrong_lengths_are_caught(monkeypatch, wrong):
    monkeypatch.setattr(objectives, "accepted_lengths", WRONG_LENGTHS[wrong])
    for check in (check_accepted_lengths, check_gradient):
        with pytest.raises(AssertionError):
            check()


def weights(logq, logp, over=-1):
    return torch.softmax(accepted_lengths(logq, logp), over)


WRONG_LOSSES = {"a gradient through the weights": lambda q, p, ce: (ce.sum(-1).mean(-1) - (weights(q, p) * q.sum(-1)).sum(-1)).mean(),
                "weights over the places": lambda q, p, ce: (ce.sum(-1).mean(-1) - ((weights(q.detach(), p, 0) - 0.5) * q.sum(-1)).sum(-1)).mean(),
                "the wrong sign": lambda q, p, ce: (ce.sum(-1).mean(-1) + ((weights(q.detach(), p) - 0.5) * q.sum(-1)).sum(-1)).mean(),
                "no cross entropy": lambda q, p, ce: -((weights(q.detach(), p) - 0.5) * q.sum(-1)).sum(-1).mean()}


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_wrong_losses_are_caught(monkeypatch, wrong):
    monkeypatch.setattr(objectives, "vsd_loss", WRONG_LOSSES[wrong])
    with pytest.raises(AssertionError):
        check_gradient()


def test_taking_the_mean_off_the_weights_only_lowers_the_noise():
    logq = torch.randn(4, 6, 3, dtype=torch.float64).sub(2).requires_grad_()
    logp, ce = torch.randn(4, 6, 3, dtype=torch.float64) - 2, torch.zeros(4, 6, 3, dtype=torch.float64)
    assert float(vsd_loss(logq.detach(), logq.detach(), ce)) == 0, "a head that is the target has nothing to learn"
    gradient = torch.autograd.grad(vsd_loss(logq, logp, ce), logq)[0]
    assert float(gradient.abs().max()) > 1e-3 and float(gradient.sum(1).abs().max()) < 1e-15


# --- the chains ---


def drawn(folder, shape: Shape, target: DenseModel, steps: int = 4):
    """A batch, its chains (tokens of the target [B, C, S]) and places, and what draw_chains says of them."""
    head = open_head(str(write_head(folder, speculators_config(shape), head_tensors(shape)) if shape.window else random_head(folder, shape)))
    boundaries = BOUNDARIES if not head.config.final_feature else (target.num_layers,)
    rows, network = TargetRows(target, boundaries, head.target_ids()), network_of(head)
    batch = make_batch([Sample("a", IDS[i, :n].tolist(), 3 + i) for i, n in enumerate(LENGTHS)])
    features, _ = rows.read(batch.ids)
    asked, follow = [], rows.follow
    rows.follow = lambda ids, slot, chains: asked.append((slot, chains)) or follow(ids, slot, chains)
    found = draw_chains(network, rows, batch, features, steps, torch.Generator().manual_seed(3))
    return head, network, rows, batch, asked, found


@pytest.mark.parametrize("shape", [Shape(), Shape(draft=None, norm_output=True, fc_norm=True), Shape("mtp", bias=True), Shape(layers=2, window=8)], ids=["eagle3", "eagle3.1", "mtp", "window"])
def test_chains_are_what_the_unrolled_head_and_a_plain_target_say(tmp_path, shape):
    """Each chain put into a text of its own, after what came before it."""
    model, steps = DenseModel.load(random_checkpoint("llama"), torch.float32, "cpu"), 4
    head, network, rows, batch, asked, (logq, logp, ce) = drawn(tmp_path, shape, model, steps)
    b, count = batch.ids.shape[0], asked[0][1].shape[1]
    logq, logp, ce = (x.view(b, len(asked), count, steps) for x in (logq, logp, ce))
    assert count == 8 and all(bool((later[0] >= earlier[0]).all()) for later, earlier in zip(asked, asked[1:]))
    ids_of = head.target_ids()
    for (slots, chains), place in zip(asked, range(len(asked))):
        for row, c in itertools.product(range(b), (0, count - 1)):
            slot, chain = int(slots[row]), chains[row, c]
            text = batch.ids[row : row + 1].clone()
            text = torch.nn.functional.pad(text, (0, 64))
            text[0, slot + 2 : slot + 2 + steps] = chain
            features, states = rows.read(text)
            teacher, _ = rows.teach(states[0, slot + 1 : slot + 1 + steps].clone())
            mine = torch.tensor([int((ids_of == t).nonzero()) if ids_of is not None else int(t) for t in chain])
            assert_bits(logp[row, place, c], teacher.gather(1, mine[:, None])[:, 0])
            with torch.no_grad():
                said = torch.stack([torch.log_softmax(network.logits(h, s)[0, slot], -1) for s, h in enumerate(network.unroll(text, features, steps))])
            assert_close(logq[row, place, c].detach(), said.gather(1, mine[:, None])[:, 0].double(), 1e-4)
            assert_close(ce[row, place, c].detach(), -(torch.softmax(teacher, -1) * said).sum(-1).double(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tree_of_a_place_is_its_chains_one_by_one(device, dtype):
    """To the bit; the second place asked for is before the first, whose nodes have overwritten what comes after it."""
    rows, ids, steps = TargetRows(DenseModel.load(random_checkpoint("llama"), dtype, device), BOUNDARIES, None), IDS.to(device), 8
    chains = torch.randint(0, 300, (2, 2, 7, steps), generator=torch.Generator().manual_seed(1)).to(device)
    slots = torch.tensor([[36, 20], [9, 0]], device=device)
    rows.read(ids)
    found = [rows.follow(ids, slot, part).clone() for slot, part in zip(slots, chains)]
    for k, row, c in itertools.product(range(2), range(2), range(7)):
        text, slot = torch.nn.functional.pad(ids[row : row + 1], (0, 64)), int(slots[k, row])
        text[0, slot + 2 : slot + 2 + steps] = chains[k, row, c]
        _, states = rows.read(text)
        assert_bits(found[k][row, c], states[0, slot + 1 : slot + 1 + steps])


def test_chains_are_drawn_from_the_head(tmp_path):
    """Second tokens by the head's law after the first: the frequencies of many draws at one place."""
    model = DenseModel.load(random_checkpoint("llama"), torch.float32, "cpu")
    head = open_head(str(random_head(tmp_path, Shape(draft=16))))
    network = network_of(head)
    features, _ = TargetRows(model, BOUNDARIES, None).read(IDS)
    counts, law = torch.zeros(16, 16), []
    generator, slots = torch.Generator().manual_seed(0), torch.full((2, 4000), 9)

    def draw(z):
        q = torch.softmax(z, -1)
        token = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(z.shape[:2])
        law.append((q, token))
        return head.target_ids()[token]

    with torch.no_grad():
        network.chains(IDS, features, slots, 2, draw)
    (first, one), (second, two) = law
    assert torch.equal(first[0, 0], first[0, -1]) and not torch.equal(first[0, 0], first[1, 0])
    for token in range(16):
        mine = second[0][one[0] == token]
        assert len(mine) == 0 or torch.allclose(mine, mine[:1].expand_as(mine), atol=1e-6), "chains with the same beginning go on alike"
    counts.index_put_((one[0], two[0]), torch.ones(4000), accumulate=True)
    expected = torch.stack([second[0][one[0] == t].mean(0) if bool((one[0] == t).any()) else torch.zeros(16) for t in range(16)]) * counts.sum(1, keepdim=True)
    used = expected > 5
    chi = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    assert chi < 1.4 * int(used.sum())


def test_places_are_of_answers():
    batch = make_batch([Sample("a", list(range(70)), 60), Sample("a", list(range(20)), 1), Sample("a", [1, 2, 3], 1)])
    seen = set()
    for seed in range(200):
        found = places(batch, torch.Generator().manual_seed(seed))
        assert bool((found[:, :-1] >= found[:, 1:]).all())
        seen |= {(row, slot) for row in range(3) for slot in found[row].tolist()}
    width = batch.ids.shape[1]
    assert seen == {(int(slot) // width, int(slot) % width) for slot in batch.slots}


# --- runs ---


@pytest.fixture(scope="module")
def sampled(target, tmp_path_factory):  # noqa: F811
    """Texts of the target's own, at temperature 1."""
    path = tmp_path_factory.mktemp("sampled") / "samples.jsonl"
    lines = [{"model": target, "temperatures": [1.0], "repeats": 1, "max_tokens": 24, "seed": 0, "prompts": "prompts.jsonl"}]
    with LLM(target, device="cpu", dtype="float32", max_model_len=128) as llm:
        outputs = llm.generate([[(5 * i + j) % 200 + 3 for j in range(3 + i % 9)] for i in range(24)], [SamplingParams(temperature=1.0, seed=i, max_tokens=24) for i in range(24)])
    lines += [{"id": str(i), "category": "c", "prompt": len(o.prompt_token_ids), "ids": o.prompt_token_ids + o.token_ids} for i, o in enumerate(outputs)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture(scope="module")
def heads(target, sampled, tmp_path_factory):  # noqa: F811
    """Heads to start from."""
    folder = tmp_path_factory.mktemp("heads")
    for method in ("eagle3", "mtp"):
        Trainer(settings(target, sampled, folder / method, method, epochs=2)).run()
    return folder


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_a_run_raises_what_is_accepted(tmp_path, target, sampled, heads, method):  # noqa: F811
    s = settings(target, sampled, tmp_path / "v", method, init_from=str(heads / method), objective="vsd", unroll=3, epochs=15, lr=1e-2, eval_every=1000)
    trainer = Trainer(s)
    accepted = [float(trainer.train_step()["accepted"]) for _ in range(trainer.total)]
    assert sum(accepted[-6:]) > 1.1 * sum(accepted[:6])


def test_a_resumed_run_draws_the_same(tmp_path, target, sampled, heads):  # noqa: F811
    common = dict(init_from=str(heads / "eagle3"), objective="vsd", unroll=3, eval_every=2)
    whole = Trainer(settings(target, sampled, tmp_path / "whole", **common))
    whole.run()
    s = settings(target, sampled, tmp_path / "parts", **common)
    Trainer(s).run(stop_after=1)
    parts = Trainer(s, resume=True)
    parts.run()
    assert all(torch.equal(value, parts.network.state_dict()[name]) for name, value in whole.network.state_dict().items())
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| objective | vsd, 3 steps, decay 1 |" in card


@pytest.mark.parametrize("given, message", [
    (dict(), "give init_from"), (dict(init_from="h", method="medusa"), "method 'medusa' has none such"), (dict(init_from="h", method="peagle"), "method 'peagle' has none such"),
    (dict(init_from="h", decay=0.8), "decay = 0.8 must be left out"), (dict(init_from="h", unroll=1), "unroll = 1 be at least 2")])
def test_settings_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.make(dict(method="eagle3", model="m", data=("d",), output="o", objective="vsd") | given)


def test_texts_must_be_sampled(tmp_path, target, data, heads):  # noqa: F811
    assert Settings.make(dict(method="eagle3", model="m", data=("d",), output="o", objective="vsd", init_from="h")).lr == 5e-6
    with pytest.raises(ValueError, match=r"captured at the temperatures \[0.0\]; they must be above 0"):
        Trainer(settings(target, data, tmp_path, init_from=str(heads / "eagle3"), objective="vsd"))

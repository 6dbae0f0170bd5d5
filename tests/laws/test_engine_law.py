"""The law of whole rounds: the first three tokens that an engine emits on tiny random models, over many seeds, against the law enumerated from the target's logits.

Every case runs the public LLM in batches of 64, requests joining as others end. A wrong q, coin, walk or commit shows in Pearson's chi-square; planted errors
must be caught with the same number of samples."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from specrt import LLM, SamplingParams, ops
from specrt.models.config import ModelConfig
from specrt.models.dense import DenseModel
from specrt.round import run
from tests.kit.forward import Sequence
from tests.kit.heads import Shape, random_head
from tests.kit.sampling import reference_transform
from tests.kit.tiny import CONFIGS, random_tensors, write_folder, write_weights
from tests.laws.test_chi_square import p_value

ALPHA = 1e-5
SAMPLES = 6000
VOCAB = 40  # a root and all its children fit one tree of 64 nodes
CLASSES = 6  # tokens modulo this: 216 cells for three tokens, well filled
PROMPT = [7, 30, 12, 5, 30, 9, 7, 30]  # ends in a phrase with two continuations: lookup drafts chains and trees
CONFIG = {**CONFIGS["llama"], "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
          "bos_token_id": None, "eos_token_id": None}

SHARP = dict(temperature=0.6)
FILTERED = dict(temperature=0.8, top_k=25, top_p=0.95)
PENALISED = dict(temperature=0.7, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.5)
STYLES = {"plain": dict(temperature=1.0), "sharp": SHARP, "filtered": FILTERED, "penalised": PENALISED}
CHAIN, TREE = dict(num_speculative_tokens=3), dict(num_steps=3, eagle_topk=3, num_draft_tokens=10)
LOOKUP = dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3)
HEAD = dict(method="eagle3", model="the head", eagle_aux_hidden_state_layer_ids=[0, 1])
HEAD_SHAPE = Shape("eagle3", vocab=VOCAB, hidden=64, target_hidden=64, heads=1, kv_heads=1, num_aux=2, draft=28)  # never drafts 12 of the 40 tokens


@dataclass
class Models:
    target: str
    draft: str
    head: str
    logits: np.ndarray  # [1 + V + V V, V]: after PROMPT, PROMPT + a, PROMPT + a + b
    laws: dict[str, np.ndarray]  # style -> [V, V, V]

    def engine(self, device: str, rule: str, keys: dict) -> LLM:
        drafter = keys if "method" in keys else {"method": "draft_model", "model": self.draft, **keys}
        drafter = drafter | ({"model": self.head} if drafter["method"] == "eagle3" else {})
        return LLM(self.target, device=device, dtype="float32", max_batch_size=64, max_model_len=128, page_size=16,
                   speculative_config={**drafter, "rejection_sample_method": rule} | ({"synthetic_acceptance_length": 2.6} if rule == "synthetic" else {}))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These ops are smaller than the cost of waking a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return make_models(tmp_path_factory.mktemp("law"))


def make_models(folder: Path) -> Models:
    """The draft model is the target blended with another, so that about half of its drafts are accepted."""
    target, draft = (str(write_folder(folder / name, CONFIG, seed=1)) for name in ("target", "draft"))
    own, other = (random_tensors(ModelConfig.from_hf(CONFIG), seed) for seed in (1, 2))
    write_weights(folder / "draft", {name: 0.8 * own[name] + 0.4 * other[name] for name in own})
    logits = all_logits(target)
    head = str(random_head(folder / "head", HEAD_SHAPE, [0, 1]))
    return Models(target, draft, head, logits, {name: law_of(logits, style) for name, style in STYLES.items()})


def all_logits(folder: str) -> np.ndarray:
    with LLM(folder, device="cpu", dtype="float32", max_batch_size=1, max_model_len=64) as llm:
        sequence = Sequence(llm._engine.round.target)
        first = sequence.prefill(PROMPT)[-1:]
        trees = [sequence.tree([a, *range(VOCAB)], [-1] + [0] * VOCAB, len(PROMPT)) for a in range(VOCAB)]
    return torch.cat([first, *(t[:1] for t in trees), *(t[1:] for t in trees)]).numpy()


def law_of(logits: np.ndarray, style: dict) -> np.ndarray:
    names = {"repetition_penalty": "repetition", "presence_penalty": "presence", "frequency_penalty": "frequency"}
    p = {names.get(k, k): v for k, v in style.items()} | {"has_penalty": int("repetition_penalty" in style)}
    prompt, none, every = np.bincount(PROMPT, minlength=VOCAB).clip(max=1), np.zeros(VOCAB, np.float32), np.ones(VOCAB, bool)

    def after(row: int, *path: int) -> np.ndarray:
        z = reference_transform(logits[row], p, np.bincount(path, minlength=VOCAB).astype(int), prompt, none, every, []).astype(np.float64)
        e = np.exp(z - z.max())
        return e / e.sum()

    law = np.empty((VOCAB,) * 3)
    first = after(0)
    for a in range(VOCAB):
        second = after(1 + a, a)
        for b in range(VOCAB):
            law[a, b] = first[a] * second[b] * after(1 + VOCAB + a * VOCAB + b, a, b)
    return law


def generate(llm: LLM, style: dict, samples: int = SAMPLES, **keys) -> tuple[np.ndarray, float]:
    """([samples, 3] tokens, accepted drafts / drafts)."""
    outs = llm.generate([PROMPT] * samples, [SamplingParams(**style, seed=seed, max_tokens=3, ignore_eos=True, **keys) for seed in range(samples)])
    drafted, accepted = sum(o.stats.num_draft_tokens for o in outs), sum(o.stats.num_accepted_tokens for o in outs)
    return np.array([o.token_ids for o in outs]), accepted / max(drafted, 1)


def worst(tokens: np.ndarray, law: np.ndarray) -> float:
    """The smallest p-value of: each token's own law, and the joint law of the three tokens' classes."""
    fold = np.eye(CLASSES)[np.arange(VOCAB) % CLASSES]
    classes = tokens % CLASSES
    joint = np.bincount((classes[:, 0] * CLASSES + classes[:, 1]) * CLASSES + classes[:, 2], minlength=CLASSES**3)
    found = [p_value(joint, np.einsum("abc,ax,by,cz->xyz", law, fold, fold, fold, optimize=True))]
    for i in range(3):
        marginal = law.sum(tuple(j for j in range(3) if j != i))
        found.append(p_value(np.bincount(tokens[:, i], minlength=VOCAB), marginal))
    return min(found)


CASES = {
    "standard, sampled chain": ("standard", CHAIN, "plain"),
    "standard, sampled tree": ("standard", TREE, "filtered"),
    "standard, sampled tree, penalties": ("standard", TREE, "penalised"),
    "standard, greedy chain": ("standard", CHAIN | {"draft_sample_method": "greedy"}, "sharp"),
    "standard, head's tree": ("standard", HEAD | TREE, "filtered"),
    "standard, lookup chain": ("standard", LOOKUP | CHAIN, "sharp"),
    "standard, lookup tree": ("standard", LOOKUP | TREE, "penalised"),
    "exact, chain": ("exact", CHAIN, "filtered"),
    "exact, tree": ("exact", TREE | {"num_draft_tokens": 12}, "penalised"),
    "exact, lookup chain": ("exact", LOOKUP | CHAIN, "plain"),
    "exact, lookup tree": ("exact", LOOKUP | TREE, "sharp"),
}


@pytest.mark.filterwarnings("ignore:head .* the draft vocabulary")
@pytest.mark.parametrize("case", CASES)
def test_rounds_follow_the_plain_law(device, models, case):
    rule, keys, style = CASES[case]
    with models.engine(device, rule, keys) as llm:
        tokens, rate = generate(llm, STYLES[style])
    assert 0 < rate < 1
    assert worst(tokens, models.laws[style]) >= ALPHA


def test_a_mixed_batch_keeps_every_law(device, models):
    """One standard engine: whole trees, shallower ones, lookup, no speculation and greedy requests side by side, each kind with its own law."""
    kinds = [dict(STYLES["filtered"]), dict(STYLES["plain"], speculative={"num_steps": 1}), dict(SHARP, speculative={"num_steps": 2}),
             dict(SHARP, speculative={"method": "ngram"}), dict(STYLES["plain"], speculative=False), dict(temperature=0.0)]
    styles = ["filtered", "plain", "sharp", "sharp", "plain", None]
    order = np.random.default_rng(5).permutation(np.arange(2 * SAMPLES) % len(kinds))
    with models.engine(device, "standard", TREE) as llm:
        outs = llm.generate([PROMPT] * order.size, [SamplingParams(**kinds[k], seed=i, max_tokens=3, ignore_eos=True) for i, k in enumerate(order)])
        greedy = llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True, speculative=False))[0].token_ids
    tokens = np.array([o.token_ids for o in outs])
    for k, style in enumerate(styles):
        mine = tokens[order == k]
        assert (mine == greedy).all() if style is None else worst(mine, models.laws[style]) >= ALPHA, kinds[k]
    widths = [max(o.stats.num_draft_tokens_per_pos, default=0) and len(o.stats.num_draft_tokens_per_pos) for o in outs]
    assert {max(w for w, k in zip(widths, order) if k == kind) for kind in (0, 1, 2, 4)} == {3, 1, 2, 0}


# ------------------------------------------------------------------------------------------------ planted errors


def flat_q(llm: LLM, monkeypatch) -> None:
    """The stored q is not what was sampled from."""
    drafter = llm._engine.round.drafters["draft_model"]
    right = drafter.draft_logits
    monkeypatch.setattr(drafter, "draft_logits", lambda: (right()[0] * 0.5, right()[1]))


def q_of_another_level(llm: LLM, monkeypatch) -> None:
    drafter = llm._engine.round.drafters["draft_model"]
    right = drafter.draft_logits
    monkeypatch.setattr(drafter, "draft_logits", lambda: (right()[0].flip(1).contiguous(), right()[1]))


def argmax_drafts(llm: LLM, monkeypatch) -> None:
    """Drafts are the argmax, verified as if sampled from q."""
    monkeypatch.setattr(llm._engine.round.drafters["draft_model"].expansion, "noise", -1)


def residual_noise_drafts(llm: LLM, monkeypatch) -> None:
    """The drafts and the residual use one stream of noise."""
    monkeypatch.setattr(llm._engine.round.drafters["draft_model"].expansion, "noise", ops.NOISE_RESIDUAL)


def one_noise_for_all_positions(llm: LLM, monkeypatch) -> None:
    right = ops.sample_transform  # it makes the target's choice too, while it has the row at hand; SHARP asks nothing else of the position

    def planted(logits, request, position, *rest, **choice):
        right(logits, request, torch.zeros_like(position) if choice else position, *rest, **choice)

    monkeypatch.setattr(ops, "sample_transform", planted)
    monkeypatch.setattr(DenseModel, "samples", False)


def one_noise_without_logits(llm: LLM, monkeypatch) -> None:
    """The same in lm_head, which makes the choice where nobody needs the logits."""
    right = ops.linear_sample

    def planted(x, weight, out_features, num_rows, request, position, *rest):
        right(x, weight, out_features, num_rows, request, torch.zeros_like(position), *rest)

    monkeypatch.setattr(ops, "linear_sample", planted)
    monkeypatch.setattr(run, "MOST_DRAWN_ROWS", 1 << 20)  # the whole batch without logits


@pytest.mark.parametrize("rule, keys, plant", [
    ("standard", CHAIN, flat_q), ("standard", TREE, flat_q), ("standard", CHAIN, q_of_another_level), ("standard", CHAIN, argmax_drafts),
    ("standard", TREE, residual_noise_drafts), ("exact", CHAIN, one_noise_for_all_positions), ("exact", CHAIN, one_noise_without_logits)])
def test_planted_errors_are_caught(device, models, monkeypatch, rule, keys, plant):
    with models.engine(device, rule, keys) as llm:
        plant(llm, monkeypatch)
        tokens, _ = generate(llm, SHARP)
    assert worst(tokens, models.laws["sharp"]) < ALPHA


# ------------------------------------------------------------------------------------------------ synthetic


def test_synthetic_chains_have_the_length_that_was_asked(device, models):
    with models.engine(device, "synthetic", CHAIN) as llm:
        outs = llm.generate([PROMPT] * 200, [SamplingParams(temperature=1.0, seed=seed, max_tokens=60, ignore_eos=True) for seed in range(200)])
    lengths = []
    for out in outs:
        assert out.stats.synthetic and out.stats.lossy
        ends = np.flatnonzero(~np.array(out.drafted))[:15]  # a round ends with the target's own token; 15 rounds always fit
        lengths += np.diff(ends, prepend=-1).tolist()
    assert set(lengths) == {2, 3}
    assert np.mean(lengths) == pytest.approx(2.6, abs=5 * np.sqrt(0.24 / len(lengths)))

"""The drafter of heads in whole rounds: what it proposes against the formulas, after any acceptance the state of a fresh prompt, a tree of one branch a chain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from specrt import LLM, SamplingParams
from specrt.draft.head import HeadDrafter
from specrt.draft.peagle import PEagleDrafter
from specrt.models.config import ModelConfig
from tests.draft.test_head_network import name_of
from tests.invariance.matrix import make
from tests.kit.compare import assert_bits, assert_close
from tests.kit.forward import Sequence
from tests.kit.heads import MASK, MTP, Reference, Shape, head_tensors, layer_prefix, original_config, random_head, speculators_config, write_head
from tests.kit.tiny import CONFIGS, random_tensors, tiny_tokenizer, write_folder, write_weights

TARGET = {**CONFIGS["llama"], "num_hidden_layers": 4, "intermediate_size": 160, "max_position_embeddings": 1024}
BOUNDARIES = (0, 2, 4)
pytestmark = pytest.mark.filterwarnings("ignore:head .* the draft vocabulary")
CHAIN, TREE = dict(num_speculative_tokens=4), dict(num_steps=4, eagle_topk=3, num_draft_tokens=12)
PROMPTS = [[(7 * i + 11) % 300 for i in range(n)] for n in (19, 1, 40)]


def speculative(head: str, s: Shape, shape: dict) -> dict:
    ids = dict(eagle_aux_hidden_state_layer_ids=list(BOUNDARIES)) if s.family in ("eagle3", "peagle") else {}
    return dict(method=s.family, model=head, **ids, **shape)


def engine(folders, s: Shape, shape: dict, **settings) -> tuple[LLM, HeadDrafter]:
    target, head = folders
    llm = make(target, dtype=settings.pop("dtype", "float32"), page_size=16, max_model_len=256, speculative_config=speculative(head, s, shape), **settings)
    return llm, llm._engine.round.drafters[s.family]


SHAPES = {"eagle3": Shape(norm_before_residual=True), "eagle3.1": Shape(layers=2, fc_norm=True, norm_output=True, draft=None), "eagle": Shape("eagle", fc_bias=True), "mtp": Shape("mtp"),
          "peagle": Shape("peagle", layers=2, norm_before_fc=True), "window": Shape(layers=2, window=6)}


@pytest.fixture(scope="module", params=SHAPES)
def folders(request, tmp_path_factory):
    folder, s = tmp_path_factory.mktemp("heads"), SHAPES[request.param]
    return s, (str(write_folder(folder / "target", TARGET)), str(random_head(folder / "head", s)))


def start(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list:
    requests = llm._prepare(prompts, params, False)
    for (request,) in requests:
        llm._engine.add(request)
    return [request for (request,) in requests]


def drafted(llm: LLM, method: str, temperature: float, drafts: Callable[[Any], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """What the trees of eight rounds were, with what ``drafts`` takes of the drafter after each."""
    round_, found = llm._engine.round, []
    drafter = round_.drafters[method]
    round_.lookahead = 0
    start(llm, PROMPTS, SamplingParams(temperature=temperature, seed=9, max_tokens=30, ignore_eos=True))
    for _ in range(8):
        llm._engine.step()
        found += [t.clone() for t in (round_.state.tree_token, round_.state.tree_parent, round_.state.tree_size, *drafts(drafter))]
    return found


def slot_state(llm: LLM, drafter: HeadDrafter, slot: int) -> list[torch.Tensor]:
    """All that the drafter knows of a slot: keys and values of its committed slots, and its root."""
    state = llm._engine.round.state
    position = torch.arange(int(state.seq_lens[slot]), device=state.device)
    place = state.block_table[slot, position // 16].long(), position % 16
    pools = [pool[:, place[0], :, place[1]] for pool in (drafter.pool.k, drafter.pool.v)]
    if isinstance(drafter, PEagleDrafter):  # the outputs of mask slots too
        return [*pools, drafter.root_hidden[slot * drafter.levels : (slot + 1) * drafter.levels]]
    return [*pools, drafter.root_hidden[slot], drafter.root_feature[slot]]


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_after_any_round_the_state_is_that_of_a_fresh_prompt(device, folders, dtype, shape):
    """Partial acceptance, branches, several requests: the keys of accepted slots are those of true features, to the bit."""
    s, paths = folders
    accepted = set()
    with engine(paths, s, shape, device=device, dtype=dtype, enforce_eager=True)[0] as llm, engine(paths, s, shape, device=device, dtype=dtype, max_batch_size=1)[0] as fresh:
        for one in (llm, fresh):
            one._engine.round.lookahead = 0
        requests = start(llm, PROMPTS, SamplingParams(temperature=1.0, seed=2, max_tokens=80, ignore_eos=True))
        for i in range(15):
            before = [len(r.output) for r in requests]
            llm._engine.step()
            accepted |= {len(r.output) - b - 1 for r, b in zip(requests, before)}
            if i % 3 != 2:
                continue
            for request in requests:
                got = slot_state(llm, llm._engine.round.drafters[s.family], request.slot)
                (again,) = start(fresh, [request.prompt + request.output], SamplingParams(temperature=1.0, seed=2, max_tokens=1, ignore_eos=True))
                fresh._engine._schedule()
                fresh._engine._prefill()
                for a, b in zip(got, slot_state(fresh, fresh._engine.round.drafters[s.family], again.slot)):
                    assert not torch.isnan(a).any()
                    assert_bits(a, b)
                fresh._engine.abort(again)
    assert len(accepted & {1, 2, 3}) >= 2, f"rounds accepted {sorted(accepted)} drafts: nothing partial was tested"


def test_what_is_proposed_is_what_the_formulas_say(device, folders):
    """Every candidate of an expansion: token, parent, and cumulative log-probability; so positions, masks, parents' features and ids are right."""
    s, paths = folders
    with engine(paths, s, TREE, device=device, enforce_eager=True)[0] as llm:
        round_, drafter = llm._engine.round, llm._engine.round.drafters[s.family]
        round_.lookahead = 0
        requests = start(llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
        for _ in range(4):
            llm._engine.step()
        round_.propose(round_.shape())
        for request in requests:
            check_candidates(s, round_.target, drafter, request)


def reference_root(s: Shape, target, drafter: HeadDrafter, request) -> tuple[Reference, tuple]:
    """The network's reading, and what a request's tree grows from: (log-probabilities, feature, slots so far, score)."""
    known = request.prompt + request.output
    features = {j: torch.empty(len(known), 128, device=target.device) for j in drafter.features}
    Sequence(target).prefill(known, features)
    source = random_tensors(ModelConfig.from_hf(TARGET))
    reference = Reference(s, head_tensors(s), source["model.embed_tokens.weight"], source["lm_head.weight"], source["model.norm.weight"])
    past: list = []
    for i in range(len(known) - 1):
        z, feature, past = reference.slot(known[i + 1], reference.combine([features[j][i] for j in drafter.features]), i, past)
    return reference, (reference.over_target(z, 300), feature, past, 0.0)


def check_candidates(s: Shape, target, drafter: HeadDrafter, request) -> None:
    grow, slot = drafter.expansion, request.slot
    reference, root = reference_root(s, target, drafter, request)
    if s.family == "peagle":
        levels = [root[0], *(reference.over_target(z, 300) for z in reference.masked(TREE["num_steps"] - 1, MASK, root[2]))]
        check_levels(levels, *(t[slot].tolist() for t in (grow.cand_token, grow.cand_parent, grow.cand_score)))
        return
    nodes: dict[int, tuple] = {}
    tokens, parents, scores = (t[slot].tolist() for t in (grow.cand_token, grow.cand_parent, grow.cand_score))
    for c, (token, parent) in enumerate(zip(tokens, parents)):
        at = root if parent < 0 else nodes.get(parent) or grown(reference, nodes, parent, tokens, parents, root)
        assert_close(torch.tensor(scores[c]), at[3] + at[0][token], 1e-4)
        siblings = [tokens[i] for i in range(len(tokens)) if parents[i] == parent]
        assert sorted(siblings) == sorted(at[0].topk(3).indices.tolist())


def check_levels(levels: list[torch.Tensor], tokens: list[int], parents: list[int], scores: list[float]) -> None:
    """Candidates of a level whose logits are the same under every parent."""
    path: dict[int, tuple[float, int]] = {-1: (0.0, 0)}
    for c, (token, parent) in enumerate(zip(tokens, parents)):
        score, depth = path[parent]
        path[c] = score + float(levels[depth][token]), depth + 1
        assert token in levels[depth].topk(3).indices.tolist()
    assert_close(torch.tensor(scores), torch.tensor([path[c][0] for c in range(len(tokens))]), 1e-4)


def grown(reference: Reference, nodes: dict, c: int, tokens: list[int], parents: list[int], root: tuple) -> tuple:
    """The candidate's slot: its own token with its parent's feature, at the position behind its parent's."""
    logp, feature, past, score = root if parents[c] < 0 else nodes[parents[c]]
    z, following, longer = reference.slot(tokens[c], feature, len(past), past)
    nodes[c] = reference.over_target(z, 300), following, longer, score + float(logp[tokens[c]])
    return nodes[c]


CHOICES = [[0], [1], [4], [0, 0], [0, 2], [1, 0], [1, 1], [0, 0, 0], [0, 2, 1], [1, 1, 0], [0, 0, 0, 0], [0, 2, 1, 3]]


def test_a_static_tree_is_the_one_that_was_asked_for(device, folders):
    """Its nodes' ranks among their siblings, read off the formulas, are the given paths; whatever the scores."""
    s, paths = folders
    with engine(paths, s, dict(choices=CHOICES), device=device, enforce_eager=True)[0] as llm:
        round_, drafter = llm._engine.round, llm._engine.round.drafters[s.family]
        round_.lookahead = 0
        requests = start(llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
        for _ in range(4):
            llm._engine.step()
        round_.propose(round_.shape())
        for request in requests:
            reference, root = reference_root(s, round_.target, drafter, request)
            masked = reference.masked(3, MASK, root[2]) if s.family == "peagle" else []
            tokens, parents = round_.tree(request.slot)
            found, nodes = {0: ()}, {0: root}
            for node in range(1, len(tokens)):
                logp, feature, past, _ = nodes[parents[node]]
                found[node] = (*found[parents[node]], int((logp > logp[tokens[node]]).sum()))
                if s.family == "peagle":
                    nodes[node] = reference.over_target(masked[len(found[node]) - 1], 300) if len(found[node]) < 4 else None, None, past, 0.0
                else:
                    z, following, longer = reference.slot(tokens[node], feature, len(past), past)
                    nodes[node] = reference.over_target(z, 300), following, longer, 0.0
            assert sorted(found.values()) == sorted([(), *map(tuple, CHOICES)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_of_one_branch_is_a_chain(device, folders, temperature):
    s, paths = folders
    seen = []
    for shape in (dict(num_speculative_tokens=4), dict(num_steps=4, eagle_topk=1, num_draft_tokens=5)):
        with engine(paths, s, shape, device=device, enforce_eager=True)[0] as llm:
            seen.append(drafted(llm, s.family, temperature, lambda drafter: (drafter.expansion.cand_score, drafter.root_hidden[:3])))
    for a, b in zip(*seen, strict=True):
        assert_bits(a, b)


def test_a_prompt_of_one_token_starts_without_drafts(device, folders):
    s, paths = folders
    with engine(paths, s, CHAIN, device=device)[0] as llm:
        (out,) = llm.generate([[5]], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        assert out.stats.num_draft_tokens == 0
        (out,) = llm.generate([[5]], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        assert out.stats.num_draft_tokens > 0


def test_rejection_sampling_takes_its_chains_and_trees(device, folders):
    s, paths = folders
    for shape in (CHAIN, dict(num_steps=3, eagle_topk=3, num_draft_tokens=10)):
        spec = speculative(paths[1], s, shape) | {"rejection_sample_method": "standard"}
        with LLM(paths[0], device=device, dtype="float32", max_model_len=256, speculative_config=spec) as llm:
            outs = llm.generate(PROMPTS, SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True))
            assert all(o.finish_reason == "length" for o in outs) and sum(o.stats.num_accepted_tokens for o in outs) > 0


def test_a_broken_head_changes_nothing(device, folders, tmp_path):
    """Not a number in the head's weights: nothing is drafted that helps, and nothing else happens."""
    s, (target, head) = folders
    broken = tmp_path / "head"
    shutil.copytree(head, broken)
    tensors = head_tensors(s)
    name = layer_prefix(s.family, 0) + "mlp.down_proj.weight"
    tensors[name][3, 5] = float("nan")
    write_head(broken, json.loads((broken / "config.json").read_text()), tensors, "bin" if s.family == "eagle" else "safetensors")
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=20, ignore_eos=True)
    found = []
    for spec in (None, speculative(str(broken), s, TREE)):
        with make(target, device=device, max_model_len=256, speculative_config=spec) as llm:
            found.append([out.token_ids for out in llm.generate(PROMPTS, params)])
    assert found[0] == found[1]


def test_what_a_head_is_not_taken_for(folders):
    s, (target, head) = folders
    other = "eagle" if s.family == "eagle3" else "eagle3"
    with pytest.raises(ValueError, match=f"'method'. = '{other}', but .* is a head of method '{s.family}'"):
        LLM(target, device="cpu", speculative_config=dict(method=other, model=head))
    with pytest.raises(ValueError, match="is no folder here"):
        LLM(target, device="cpu", speculative_config=dict(method=other, model=head + "/no"))


def test_norm_output_can_be_overridden(folders, tmp_path):
    s, (target, head) = folders
    if s.family not in ("eagle3", "peagle"):
        pytest.skip("no such flag")
    for given in (None, True, False):
        with LLM(target, device="cpu", max_model_len=64, speculative_config=speculative(head, s, CHAIN) | ({} if given is None else {"norm_output": given})) as llm:
            assert llm._engine.round.drafters[s.family].model.config.norm_output is (s.norm_output if given is None else given)


@pytest.mark.parametrize("s", [Shape("eagle", vocab=200), Shape("eagle", vocab=400, own_embedding=True), Shape("mtp", vocab=400), Shape(vocab=200, draft=None, own_lm_head=False),
                               Shape(vocab=200, draft=None), Shape(vocab=400)], ids=name_of)
def test_a_vocabulary_that_is_padded_otherwise(tmp_path, device, s):
    """By more than a block of rows, as Qwen2's sizes differ: with the target's tokenizer beside it, a head drafts what both have, through whoever's lm_head it is."""
    target, tensors = str(write_folder(tmp_path / "target", TARGET)), head_tensors(s)
    if "d2t" in tensors:
        tensors |= {"d2t": torch.arange(100), "t2d": torch.zeros(400, dtype=torch.bool).index_fill_(0, 2 * torch.arange(100), True)}  # of those that both have
    head = write_head(tmp_path / "head", original_config(s), tensors)
    tiny_tokenizer().save(str(head / "tokenizer.json"))
    found = []
    for spec in (None, speculative(str(head), s, TREE)):
        with make(target, device=device, max_model_len=64, speculative_config=spec) as llm:
            found.append(llm.generate([PROMPTS[0]], SamplingParams(temperature=1.0, seed=1, max_tokens=30, ignore_eos=True))[0])
    assert found[0].token_ids == found[1].token_ids and found[1].stats.num_accepted_tokens > 0


def knowing_head(folder, family: str) -> Shape:
    """A head that passes its token's embedding on and nothing else: EAGLE and MTP by fc, EAGLE-3 by an attention that sees its own slot alone."""
    three = family == "eagle3"
    s = Shape(family, norm_before_residual=three, window=int(three), draft=None, own_lm_head=False)
    silent = ("down_proj.weight", "fc.weight") if three else ("o_proj.weight", "down_proj.weight")
    tensors = {n: torch.zeros_like(t) if n.endswith(silent) else torch.ones_like(t) if t.ndim == 1 else t for n, t in head_tensors(s).items()}
    own, other = torch.eye(128), torch.zeros(128, 128)
    if three:
        tensors["midlayer.self_attn.v_proj.weight"] = torch.cat([own, other], dim=1)
        first, _, second, _ = torch.eye(256).split(64)  # two query heads see each of the two value heads
        tensors["midlayer.self_attn.o_proj.weight"] = torch.cat([first, second])
        tensors["midlayer.hidden_norm.weight"] = torch.zeros(128)
    else:
        tensors["fc.weight" if family == "eagle" else MTP + "input_proj.weight"] = torch.cat([own, other] if family == "eagle" else [other, own], dim=1)
    write_head(folder, speculators_config(s) if three else original_config(s), tensors)
    return s


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("family", ["eagle3", "eagle", "mtp"])
def test_a_head_that_knows_the_rule_is_always_right(device, tmp_path, family, shape):
    """A target whose layers add nothing says, surely, a function of the last token; a head that passes its token's embedding on says the same one token later. So every draft of
    a chain is accepted, and of a tree a whole branch: feature, token and position of a slot stand together as they should, round after round."""
    silent = {n: torch.zeros_like(t) if n.endswith(("o_proj.weight", "down_proj.weight")) else t for n, t in random_tensors(ModelConfig.from_hf(TARGET)).items()}
    write_weights(write_folder(tmp_path / "target", TARGET), silent | {"model.norm.weight": torch.ones(128), "lm_head.weight": 20 * silent["lm_head.weight"]})
    s = knowing_head(tmp_path / "head", family)
    with make(str(tmp_path / "target"), device=device, dtype="float32", max_model_len=256, speculative_config=speculative(str(tmp_path / "head"), s, shape)) as llm:
        for out in llm.generate([PROMPTS[0], PROMPTS[2]], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)):
            assert out.stats.num_rounds == 8 and out.stats.num_accepted_tokens == 32, out.stats


def test_the_mask_token_of_a_head_whose_config_does_not_say(folders, tmp_path):
    s, (target, _) = folders
    if s.family != "peagle":
        pytest.skip("no mask token")
    head = str(write_head(tmp_path / "head", {k: v for k, v in original_config(s).items() if k != "mask_token_id"}, head_tensors(s)))
    spec = speculative(head, s, CHAIN)
    with pytest.raises(ValueError, match=r"no mask_token_id; give speculative_config\['mask_token_id'\]"):
        LLM(target, device="cpu", speculative_config=spec)
    with pytest.raises(ValueError, match="mask_token_id = 300, the target has 300 tokens"):
        LLM(target, device="cpu", speculative_config=spec | {"mask_token_id": 300})
    with LLM(target, device="cpu", max_model_len=64, speculative_config=spec | {"mask_token_id": 9}) as llm:
        assert llm._engine.round.drafters["peagle"].mask_token == 9


def test_drafts_do_not_depend_on_who_else_is_in_the_batch(device, folders):
    """Requests of differing depths side by side: rows of a level find their parents' features among fewer and fewer slots. Rounds and acceptance are those of each alone."""
    s, paths = folders
    wishes = [{"num_steps": 2}, None, {"num_steps": 3, "num_draft_tokens": 8}, {"num_steps": 1}, {"method": "ngram"}]
    params = [SamplingParams(temperature=1.0, seed=3 + i, max_tokens=30, ignore_eos=True, speculative=wish) for i, wish in enumerate(wishes)]
    prompts = [[(5 * i + j) % 300 for j in range(12 + 7 * i)] for i in range(len(wishes))]
    facts = lambda out: (out.token_ids, out.stats.num_rounds, out.stats.num_draft_tokens_per_pos, out.stats.num_accepted_tokens_per_pos)  # noqa: E731
    with engine(paths, s, TREE, device=device, max_batch_size=5)[0] as llm:
        together = [facts(out) for out in llm.generate(prompts, params)]
        alone = [facts(llm.generate(p, q)[0]) for p, q in zip(prompts, params)]
    assert together == alone
    assert sum(sum(accepted) for *_, accepted in together) > 0

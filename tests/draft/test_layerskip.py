"""LayerSkip: the drafts are those of the target cut off after its first layers, whose keys and values it need not have a copy of."""

from __future__ import annotations

import json

import pytest
import torch

from specrt import LLM, SamplingParams
from specrt.models.config import ModelConfig
from specrt.models.dense import DenseModel
from specrt.weights import open_checkpoint
from specrt.weights.inspect import describe
from tests.draft.test_head_drafter import PROMPTS, TARGET, start
from tests.invariance.matrix import make
from tests.kit.compare import assert_bits
from tests.kit.forward import Sequence
from tests.kit.tiny import CONFIGS, random_tensors, write_folder, write_weights

CHAIN, TREE, STATIC = dict(num_speculative_tokens=4), dict(num_steps=4, eagle_topk=3, num_draft_tokens=12), dict(choices=[[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
LAYERS = TARGET["num_hidden_layers"]
WINDOW = {**CONFIGS["mistral"], "sliding_window": 12}
QWEN = CONFIGS["qwen3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layerskip")


def models(folder, config: dict, exit_layer: int) -> tuple[str, str]:
    """A target, and a checkpoint of its first layers: weights follow from their names, so they are the target's."""
    return tuple(str(write_folder(folder / f"{config['model_type']}{config['hidden_size']}-{n}", {**config, "num_hidden_layers": n})) for n in (config["num_hidden_layers"], exit_layer))


def test_the_first_layers_share_every_tensor(folder, device):
    whole, cut = (DenseModel.load(open_checkpoint(path), torch.bfloat16, device) for path in models(folder, TARGET, 2))
    view = whole.first_layers(2)
    assert view.config == cut.config and whole.num_layers == len(whole.layers) == LAYERS
    assert view.lm_head is whole.lm_head and view.embedding is whole.embedding and all(a is b for a, b in zip(view.layers, whole.layers[:2], strict=True))
    tokens = PROMPTS[2]
    assert_bits(Sequence(view).prefill(tokens), Sequence(cut).prefill(tokens))
    assert_bits(Sequence(view).decode(tokens), Sequence(cut).decode(tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("exit_layer", range(1, LAYERS))
def test_a_chain_is_the_cut_models_greedy_continuation(folder, device, dtype, exit_layer):
    target, cut = models(folder, TARGET, exit_layer)
    spec = dict(method="layerskip", exit_layer=exit_layer, **CHAIN)
    with make(target, device=device, dtype=dtype, page_size=16, max_model_len=256, enforce_eager=True, speculative_config=spec) as llm, LLM(cut, device=device, dtype=dtype) as other:
        round_ = llm._engine.round
        round_.lookahead = 0
        requests = start(llm, PROMPTS, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
        for _ in range(4):
            llm._engine.step()
        round_.propose(round_.shape())
        outs = other.generate([r.prompt + r.output for r in requests], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        assert [round_.state.tree_token[r.slot, 1:5].tolist() for r in requests] == [out.token_ids for out in outs]


@pytest.mark.parametrize("config", [TARGET, WINDOW, QWEN], ids=["llama", "window", "qwen3"])
@pytest.mark.parametrize("rule, shape", [("exact", CHAIN), ("exact", TREE), ("exact", STATIC), ("standard", CHAIN)], ids=["chain", "tree", "static", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_round_is_a_separate_draft_models(folder, device, config, rule, shape, temperature):
    """The borrowed keys are, to the bit, those that a draft model of the same layers keeps in pages of its own: after any acceptance both propose the same tree."""
    layers = config["num_hidden_layers"]
    target, cut = models(folder, config, layers - 1)
    settings = dict(device=device, page_size=16, max_model_len=256, enforce_eager=True, chunk=16)
    specs = dict(method="layerskip", exit_layer=layers - 1), dict(method="draft_model", model=cut)
    llms = [make(target, speculative_config={**spec, **shape, "rejection_sample_method": rule}, **settings) for spec in specs]
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=30, ignore_eos=True)
    accepted = set()
    for llm in llms:
        llm._engine.round.lookahead = 0
    requests = [start(llm, PROMPTS, params) for llm in llms]
    ours, theirs = (llm._engine.round.state for llm in llms)
    while any(request.finish_reason is None for request in requests[0]):
        for llm in llms:
            llm._engine.step()
        used = torch.arange(ours.nodes, device=ours.device) < ours.tree_size[:, None]
        for name in ("tree_size", "path_len", "seq_lens"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.tree_token[:, 1:][used[:, 1:]], theirs.tree_token[:, 1:][used[:, 1:]])
        assert torch.equal(ours.tree_parent[used], theirs.tree_parent[used])
        accepted |= set(ours.path_len.tolist())
    assert [r.output for r in requests[0]] == [r.output for r in requests[1]] and all(len(r.output) == 30 for r in requests[0])
    assert len(accepted - {0}) >= 2, accepted
    for llm in llms:
        llm.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_the_last_layer_adds_nothing_every_draft_is_right(folder, device, temperature):
    target, tensors = write_folder(folder / "idle", TARGET), random_tensors(ModelConfig.from_hf(TARGET))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{LAYERS - 1}.{name}.weight"].zero_()
    write_weights(target, tensors)
    with make(target, device=device, speculative_config=dict(method="layerskip", exit_layer=LAYERS - 1, **CHAIN)) as llm:
        outs = llm.generate(PROMPTS, SamplingParams(temperature=temperature, seed=3, max_tokens=25, ignore_eos=True))  # five rounds
    assert all(out.stats.draft_acceptance_rate == 1.0 and out.stats.num_draft_tokens == 20 for out in outs)


def test_it_costs_no_pages(folder, device):
    target, _ = models(folder, TARGET, 1)
    with LLM(target, device=device, speculative_config=dict(method="layerskip", exit_layer=3, **TREE)) as llm:
        round_ = llm._engine.round
        drafter = round_.drafters["layerskip"]
        assert drafter.pool is round_.pool and drafter.bytes_per_page(64) == 0


def test_the_targets_files_may_say_the_exit_layer(folder, device):
    target = write_folder(folder / f"layerskip-tiny-{device}", TARGET)
    assert f"LayerSkip target, method 'layerskip'; say exit_layer, 1 to {LAYERS - 1}" in describe(target)
    with pytest.raises(ValueError, match="'exit_layer'. is missing.*no assistant_early_exit.*4 layers"):
        LLM(target, device=device, speculative_config={"method": "layerskip"})
    (target / "generation_config.json").write_text(json.dumps({"assistant_early_exit": 2}))
    assert "exit_layer 2 (assistant_early_exit)" in describe(target)
    for given, layers in (({}, 2), ({"exit_layer": 3}, 3)):
        with LLM(target, device=device, speculative_config={"method": "layerskip", **given}) as llm:
            assert llm._engine.round.drafters["layerskip"].model.num_layers == layers
    (target / "generation_config.json").write_text(json.dumps({"assistant_early_exit": LAYERS}))
    with pytest.raises(ValueError, match="assistant_early_exit = 4 is not valid.*below.*4"):
        LLM(target, device=device, speculative_config={"method": "layerskip"})
    with pytest.raises(ValueError, match="'exit_layer'. = 4 is not valid.*below.*4"):
        LLM(target, device=device, speculative_config={"method": "layerskip", "exit_layer": LAYERS})


def test_other_models_are_not_called_layerskip(folder):
    assert "LayerSkip" not in describe(models(folder, TARGET, 1)[0])

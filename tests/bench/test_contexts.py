"""What the texts cost the drafts and what the noise does: rounds are counted in the same places, and the rows make the table."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from bench import contexts
from bench.contexts import MOST, PLAIN, SHARED, TEMPERATURES, TREE
from bench.results import KEYS, Results
from specrt import LLM
from specrt.cli.prompts import load_prompts
from specrt.config import EngineConfig
from tests.kit.tiny import CONFIGS, write_folder

LAYERSKIP = TREE | {"method": "layerskip", "exit_layer": 2}  # the tiny model drafts with two of its three layers: some of it is accepted


@pytest.fixture
def one_thread():
    """A tiny model is faster on one, by far where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_methods_are_what_their_rows_say():
    configs = {name: EngineConfig.parse(device="cpu", speculative_config=config, target="smollm2-135m").speculative for name, config in contexts.METHODS.items()}
    assert {name: config.draft_sample_method for name, config in configs.items()} == {SHARED: "shared_noise", PLAIN: "greedy"}
    assert len({config.num_draft_tokens for config in configs.values()}) == 1


def test_rounds_in_the_same_places(one_thread, tmp_path, monkeypatch):
    model = str(write_folder(tmp_path / "model", CONFIGS["llama"] | {"max_position_embeddings": 2048}))
    monkeypatch.setattr(contexts, "METHODS", {SHARED: LAYERSKIP, PLAIN: LAYERSKIP | {"draft_sample_method": "greedy"}})
    prompts = [min(load_prompts(), key=lambda prompt: len(prompt.text))]
    counts = contexts.measure(model, "cpu", prompts, tokens=24, every=3)
    assert set(counts) == {(name, *ts) for name, ts in product((SHARED, PLAIN), product(TEMPERATURES, TEMPERATURES)) if name == SHARED or ts[1] > 0}
    assert all(1 <= n <= MOST for found in counts.values() for n in found) and len({len(counts[name, text_t, t]) for name, text_t, t in counts}) == 1
    assert all(sum(counts[SHARED, t, 1.0]) > sum(counts[PLAIN, t, 1.0]) for t in TEMPERATURES), "shared noise drafts what the noise will choose"

    with LLM(model, device="cpu", max_batch_size=4, max_model_len=2048, speculative_config=contexts.METHODS[PLAIN]) as llm:
        places = contexts.contexts(llm, prompts, 1.0, 24, 3)
        assert contexts.first_rounds(llm, places, 0.0) == counts[SHARED, 1.0, 0.0], "no noise at T = 0: the same texts, the same drafts"
        assert contexts.first_rounds(llm, places, 0.6) == counts[PLAIN, 1.0, 0.6]


def made_up(names):
    """Rows of ten places: rounds give 4 tokens in greedy texts and 2 in others, half of it at T > 0."""
    results = Results("unused.json")
    tokens = lambda text_t, t: (4 if text_t == 0 else 2) // (1 if t == 0 else 2)  # noqa: E731
    contexts.add_rows(results, "a model, a tree", {(name, text_t, t): [tokens(text_t, t)] * 10 for name in names for text_t in TEMPERATURES for t in TEMPERATURES if name == SHARED or t > 0})
    return results.rows


@pytest.mark.parametrize("names", [(SHARED,), (SHARED, PLAIN)])
def test_rows_and_table(names):
    rows = made_up(names)
    assert all(tuple(row) == KEYS for row in rows) and len({(row["name"], row["shape"], row["peer"]) for row in rows}) == len(rows)
    assert {row["note"] for row in rows} == {"10 places, standard error 0.000"}
    text = contexts.table({"machine": "a machine", "rows": rows})
    both = PLAIN in names
    assert text.startswith(f"a machine, {rows[0]['date']}; a model, a tree.\n\n| texts | rounds at T = 0 | rounds at T = 0.6 | rounds at T = 1 |")
    assert ("rounds at T = 1, plain top-k children |" in text) == both and "rounds at T = 0, plain" not in text
    assert "| T = 0 | 4.00 (1.00) |" + " 2.00 (0.50) |" * (4 if both else 2) + "\n" in text
    assert "| T = 1 | 2.00 (1.00) |" + " 1.00 (0.50) |" * (4 if both else 2) + "\n" in text


def test_a_table_has_what_was_measured():
    rows = made_up((SHARED, PLAIN))
    other = [row | {"shape": row["shape"].replace("a model", "another")} for row in made_up((SHARED,))]
    some = [row for row in rows if (row["name"], row["shape"]) != (PLAIN, "a model, a tree, texts of T = 0.6, rounds at T = 1")]
    text = contexts.table({"machine": "a machine", "rows": some + other})
    assert "| T = 0.6 | 2.00 (1.00) | 1.00 (0.50) | 1.00 (0.50) | 1.00 (0.50) |  |\n" in text and text.count("a machine") == 2
    assert contexts.table({"machine": None, "rows": []}) == "Not measured yet.\n"

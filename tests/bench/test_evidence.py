"""The results files and the table made from them; measuring, with programs that only pretend to."""

import json
import re
import stat

import pytest
import torch

from bench import bench_round, contexts, evidence, readme, results, training
from bench.evidence import JUDGED, Limit
from bench.results import EVERY, KEYS, ROOMS, ROOT, card, csrc_digest, rooms_of
from specrt.models.dense import DenseModel
from tests.kit.tiny import random_checkpoint
from tests.structure.sources import bench_files

FILES = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_results_have_one_form(path):
    content = json.loads(path.read_text())
    assert content.keys() == {"machine", "rows"} and content["machine"] and content["rows"]
    for row in content["rows"]:
        assert tuple(row) == KEYS, f"{sorted(set(row) ^ set(KEYS))}"
        assert all(isinstance(row[key], str) and row[key] for key in ("name", "shape", "unit", "commit"))
        assert all(row[key] is None or isinstance(row[key], (int, float)) for key in ("floor", "share_of_floor", "peer_value", "ratio"))
        assert isinstance(row["value"], (int, float)) and row["spread"] >= 0
        assert re.fullmatch(r"[0-9a-f]{16}", row["digest"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
        assert (row["peer_value"] is None) == (row["ratio"] is None) and (row["floor"] is None) == (row["share_of_floor"] is None)
        assert row["floor"] is None or row["share_of_floor"] == pytest.approx(row["floor"] / row["value"])
    if card(content["machine"]) == path.stem:
        names = [row["name"] for row in content["rows"]]
        assert len(names) == len(set(names)), "a GPU row is known by its name"


@pytest.mark.parametrize("file", [evidence.README, evidence.BENCH_README])
def test_tables_and_figures_are_up_to_date(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert evidence.with_table(file, text) == text, "make evidence-table"


def test_rows_know_their_rooms():
    assert rooms_of("linear_bf16_m8") == tuple(sorted([*EVERY, "gemm"])) == rooms_of("prefill_linear_bf16_m4096")
    assert rooms_of("decode_attention_b1_1k") == tuple(sorted([*EVERY, "attention"]))
    assert rooms_of("decode_step_b1_1k") is None and rooms_of("verify_n64_b1_1k") is None and rooms_of("llama1b_decode_step_b1") is None
    for room in {room for rooms in ROOMS.values() for room in rooms}:
        assert (ROOT / "csrc" / room).is_dir()


def test_every_row_of_the_binaries_has_rooms():
    names = [name for path in bench_files() if path.suffix == ".cu" for name in re.findall(r'\{"([a-z]\w*_\w+)", ', path.read_text())]
    assert len(names) > 25 and {name for name in JUDGED if re.match("linear_bf16|sampling|.*attention", name)} <= set(names)
    assert not [name for name in names if rooms_of(name) is None and name not in ("gate_up", "lm_head")]


def test_the_rounds_program_measures_the_rounds_rows(tmp_path):
    binary = tmp_path / "bench_pretended"
    binary.write_text(PROGRAM)
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    rows = [names for command, names in evidence.programs(tmp_path).items() if command[1:] and command[1].endswith("bench_round.py")]
    assert rows == [list(bench_round.ROWS)]
    assert {name for name in JUDGED if re.search("decode_step|verify_n64|round_", name)} <= set(bench_round.ROWS)


def test_the_floor_of_a_round_counts_every_weight_and_the_kv():
    target = DenseModel.load(random_checkpoint("llama-tied"), torch.float32, "cpu")
    c = target.config
    kv = c.num_kv_heads * c.head_dim
    layer = c.hidden_size * (c.num_heads * c.head_dim + 2 * kv) + c.num_heads * c.head_dim * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
    found = bench_round.round_bytes(target, bench_round.Case("smollm2", batch=3, context=100))
    padded = 64 * -(-c.vocab_size // 64) - c.vocab_size + c.num_layers * sum(-n % 64 for n in (c.num_heads * c.head_dim + 2 * kv, c.hidden_size, c.hidden_size, 2 * c.intermediate_size))
    assert 0 <= found - 4 * (c.num_layers * layer + c.vocab_size * c.hidden_size + 3 * 100 * 2 * c.num_layers * kv) <= 4 * padded * c.intermediate_size


def test_the_floor_of_a_round_with_fp8_weights_counts_a_byte_a_weight():
    wide, narrow = (DenseModel.load(random_checkpoint("llama"), torch.bfloat16, "cpu", quantization) for quantization in (None, "fp8"))
    weights = sum(m.weight.numel() for layer in wide.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down))
    scales = sum(m.scale.numel() for layer in narrow.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down))
    case = bench_round.Case("smollm2", context=100)
    assert bench_round.round_bytes(wide, case) - bench_round.round_bytes(narrow, case) == weights - 4 * scales


@pytest.mark.parametrize("tree", [False, True])
def test_random_drafts_are_trees_in_topological_order(tree):
    parents = bench_round.random_parents(64, tree)
    depth = [0]
    for node, parent in enumerate(parents, start=1):
        assert 0 <= parent < node
        depth.append(depth[parent] + 1)
    assert len(parents) == 63 and (max(depth) <= bench_round.DEPTH) == tree


def test_a_digest_is_of_its_rooms(tmp_path, monkeypatch):
    for name in ("base/a.h", "gemm/a.cu", "sample/a.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True)
        (tmp_path / "csrc" / name).write_text("1")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    before = [csrc_digest(rooms) for rooms in (rooms_of("linear_"), rooms_of("sampling_"), None)]
    (tmp_path / "csrc" / "sample" / "a.cu").write_text("2")
    after = [csrc_digest(rooms) for rooms in (rooms_of("linear_"), rooms_of("sampling_"), None)]
    assert [a == b for a, b in zip(before, after)] == [True, False, False]
    assert csrc_digest() != csrc_digest(cuda=False)
    cpu = csrc_digest(cuda=False)
    (tmp_path / "csrc" / "sample" / "a.cuh").write_text("1")
    assert csrc_digest(cuda=False) == cpu and csrc_digest() != after[2]
    (tmp_path / "csrc" / "base" / "a.h").write_text("2")
    assert csrc_digest(cuda=False) != cpu


def test_cards_have_files_of_their_own():
    assert card("NVIDIA H100 80GB HBM3") == "h100"
    assert len({card(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-80GB")}) == 4


def test_limits():
    row = {"value": 10.0, "floor": 9.0, "peer_value": 8.0}
    assert Limit("share", 0.9).holds(row, {}) and not Limit("share", 0.91).holds(row, {})
    assert Limit("peer", 0.8).holds(row, {}) and not Limit("peer", 0.81).holds(row, {})
    assert Limit("read", 1.0, 1.0).holds(row, {}) and not Limit("read", 1.0, 0.9).holds(row, {})
    assert Limit("value", 10).holds(row, {}) and not Limit("value", 9.9).holds(row, {})
    bare = {"value": 1.0, "floor": None, "peer_value": None}
    assert not any(Limit(kind, 0.0, 9.0).holds(bare, {}) for kind in ("share", "peer", "read"))


def test_a_limit_that_is_another_row():
    row, other = ({"value": value, "floor": None, "peer_value": None, "digest": "d", "date": "today"} for value in (6.0, 10.0))
    assert Limit("row", 0.6, of="other").holds(row, {"other": other}) and not Limit("row", 0.59, of="other").holds(row, {"other": other})
    assert not Limit("row", 0.6, of="other").holds(row, {}), "not measured"
    assert not any(Limit("row", 0.6, of="other").holds(row, {"other": other | change}) for change in ({"digest": "e"}, {"date": "yesterday"})), "other kernels, or another day"
    assert all(limit.of in bench_round.ROWS for limits in JUDGED.values() for limit in limits if limit.kind == "row")


PROGRAM = """#!/bin/sh
names="linear_bf16_m1 linear_bf16_m8"
[ "$1" = --list ] && { echo $names; exit 0; }
rows=$2
while [ $# -gt 0 ]; do [ "$1" = --json ] && json=$2; shift; done
for name in $(echo $rows | tr , ' '); do
  [ $name = $BREAKS ] && exit 1
  echo '{"machine": "NVIDIA H100 80GB HBM3", "name": "'$name'", "shape": "s", "value": '$VALUE', "unit": "ms", "floor": 4.0, "peer": null, "peer_value": null, "spread": 0.01, "read_bandwidth": 3e12}' >>$json
done
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A folder with one pretended program; results and README go there too."""
    program = tmp_path / "bench_pretended"
    program.write_text(PROGRAM)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    tables = "".join(f"{part.BEGIN}old\n{part.END}" for part in (evidence, contexts, training))
    (tmp_path / "bench").mkdir()
    for file, text in {evidence.README: "", evidence.BENCH_README: tables}.items():
        blocks = "".join(f"<!-- {name}: made from results/ by evidence.py -->\nold\n<!-- end of {name} -->\n" for name in readme.BLOCKS[file])
        (tmp_path / file).write_text(f"before\n{text}{blocks}\nafter\n")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "SCRIPTS", ())
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setenv("VALUE", "5.0")
    monkeypatch.setenv("BREAKS", "none")
    return tmp_path


def test_measuring_writes_rows_and_table(bench, monkeypatch):
    evidence.measure(None, bench, None)
    monkeypatch.setenv("VALUE", "4.0")
    evidence.measure(["linear_bf16_m8"], bench, None)
    content = json.loads((bench / "h100.json").read_text())
    assert {row["name"]: row["value"] for row in content["rows"]} == {"linear_bf16_m1": 5.0, "linear_bf16_m8": 4.0}
    assert all(row["digest"] == csrc_digest(rooms_of("linear_")) and tuple(row) == KEYS for row in content["rows"])
    text = (bench / evidence.BENCH_README).read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert re.search(r"\*\*linear_bf16_m8\*\* .*\| aim \|", text) and re.search(r"\*\*linear_bf16_m1\*\* .*\| no \|", text)
    found = evidence.complaints(content)
    assert any(c.startswith("linear_bf16_m1: must") for c in found) and not any(c.startswith("linear_bf16_m8:") for c in found)
    assert len(found) == len(JUDGED) - 1


def test_a_row_that_fails_leaves_those_before_it(bench, monkeypatch):
    monkeypatch.setenv("BREAKS", "linear_bf16_m8")
    with pytest.raises(SystemExit, match="bench_pretended ended with status 1"):
        evidence.measure(None, bench, None)
    assert [row["name"] for row in json.loads((bench / "h100.json").read_text())["rows"]] == ["linear_bf16_m1"]


def test_unknown_rows_are_refused(bench):
    with pytest.raises(SystemExit, match="no program measures linear_bf16_m9; there are linear_bf16_m1, linear_bf16_m8"):
        evidence.measure(["linear_bf16_m9"], bench, None)


def test_stale_rows_are_found(bench):
    evidence.measure(None, bench, None)
    content = json.loads((bench / "h100.json").read_text())
    assert not any(evidence.stale(row) for row in content["rows"])
    content["rows"][0]["digest"] = "0" * 16
    assert "linear_bf16_m1: stale" in "\n".join(evidence.complaints(content))

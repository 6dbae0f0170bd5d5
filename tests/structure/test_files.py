"""Rules on files: size, forbidden calls and flags."""

import ast
import re

import pytest

from tests.structure.sources import ROOT, bench_files, module_name, native_files, python_files

MOST_LINES = 600
HOST_READS = {"item", "cpu", "tolist", "nonzero", "numpy"}
# The one module under these rooms that copies from the device, once a round.
HOST_READER = "specrt.round.result"


@pytest.mark.parametrize("path", [*python_files("specrt", "bench", "tests"), *native_files(), *bench_files()], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_stay_readable(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES, f"{len(lines)} lines; split the concept"
    assert not [n for n, line in enumerate(lines, 1) if re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", line)], "unfinished work belongs in an issue"


@pytest.mark.parametrize("path", python_files("specrt/round", "specrt/draft", "specrt/models", "specrt/layers"), ids=module_name)
def test_no_host_sync_in_a_round(path):
    if module_name(path) == HOST_READER:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    wrong = [f"line {node.lineno}: .{node.func.attr}()" for node in calls if node.func.attr in HOST_READS]
    assert not wrong, f"host reads belong in {HOST_READER}: {wrong}"


def test_no_flag_lets_the_compiler_choose_an_order():
    """csrc/README.md 2 and 8."""
    build = "\n".join(p.read_text() for p in [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake"), ROOT / "setup.py"])
    code = "\n".join(line.split("#")[0] for line in build.splitlines())
    assert "-ffp-contract=off" in code and "-fmad=false" in code
    assert not re.search(r"fast[-_]math|-Ofast|funsafe|fassociative", code)
    for path in native_files(".cu", ".cuh"):
        assert not re.search(r"\batomicAdd\s*\(\s*(\(float|reinterpret_cast<float)", path.read_text()), f"{path}: float atomics have no order"

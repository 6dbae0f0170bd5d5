"""Every op has one schema, a typed function in ops.py with the same arguments, and an implementation for both backends."""

import inspect
import re

import pytest
import torch

from bench import sanitize_ops
from specrt import ops
from tests.structure.sources import ROOT

SCHEMAS = {s.name.split("::")[1]: s for s in torch._C._jit_get_all_schemas() if s.name.startswith("specrt::")}


def registered(key: str) -> set[str]:
    return {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_registrations_for_dispatch_key(key) if name.startswith("specrt::")}


def test_the_library_declares_what_was_built():
    declared = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "ops" / "library.cpp").read_text())
    assert sorted(declared) == sorted(SCHEMAS) and declared


def test_every_op_runs_on_the_cpu():
    assert registered("CPU") == set(SCHEMAS)


def test_cuda_has_the_same_ops():
    assert registered("CUDA") == registered("CPU")


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_python_function_mirrors_the_schema(name):
    function = getattr(ops, name, None)
    assert function is not None and function.__doc__, f"specrt/ops.py has no documented '{name}'"
    if name != "pack_linear":  # it allocates its result
        assert list(inspect.signature(function).parameters) == [a.name for a in SCHEMAS[name].arguments]
    written = [a.name for a in SCHEMAS[name].arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written, "an op that writes nothing does nothing"
    assert not SCHEMAS[name].returns, "results go to preallocated outputs"


def test_every_function_of_ops_is_an_op():
    calls = set(re.findall(r"_C\.(\w+)\(", (ROOT / "specrt" / "ops.py").read_text()))
    assert calls == set(SCHEMAS)


def test_the_sanitizer_sees_every_op():
    """bench/sanitize_ops.py is what compute-sanitizer runs."""
    called = set(re.findall(r"ops\.(\w+)\(", (ROOT / "bench" / "sanitize_ops.py").read_text()))
    assert set(SCHEMAS) <= called


def test_the_sanitizer_run_passes_on_the_cpu():
    for part in sanitize_ops.PARTS:
        part(sanitize_ops.Kit("cpu"))

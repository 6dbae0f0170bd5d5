"""The direction of imports and includes: no file reaches into a room to its left (specrt/README.md, csrc/README.md)."""

import re

import pytest

from tests.structure.sources import ROOT, bench_files, imports, includes, module_name, native_files, python_files

# Left to right: a room may use the rooms to its right. draft stands left of models (a drafter may be made of a model), never the other way.
ORDER = [{"cli", "serve"}, {"train"}, {"llm"}, {"engine"}, {"round"}, {"draft"}, {"models"}, {"layers"}, {"ops"}]
# Beside the line: what a room of data may use itself. Every room but ops may use them.
# (config asks the drafters' registry which methods there are, so that a new family is one line.)
BESIDE = {"weights": {"weights", "models.config", "text", "heads", "ops"}, "cache": {"cache", "ops"}, "text": {"text"}, "config": {"checks", "draft", "heads"},
          "sampling_params": {"checks"}, "checks": set(), "heads": set()}
# Plain data shared by both sides of a boundary: usable everywhere, and using nothing but ops.
SHARED = {"specrt.round.state", "specrt.models.config"}


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


def allowed(source: str, target: str) -> bool:
    if target in SHARED:
        return True
    if source in SHARED:
        return target == "specrt.ops"
    room, other = source.split(".")[1], target.split(".")[1]
    if room == other or room == "__main__":
        return True
    if room in BESIDE:
        return any(target == f"specrt.{name}" or target.startswith(f"specrt.{name}.") for name in BESIDE[room])
    if other in BESIDE:
        return room != "ops"
    return level(other) > level(room)


@pytest.mark.parametrize("path", python_files("specrt"), ids=module_name)
def test_python_imports_go_one_way(path):
    source = module_name(path)
    if source == "specrt":
        assert imports(path) <= {"specrt.llm", "specrt.sampling_params"}, "specrt/__init__.py gives the public names and nothing else"
        return
    # `from specrt import LLM` is an import of the API: of llm.
    targets = {"specrt.llm" if name == "specrt" else name for name in imports(path)}
    wrong = sorted(t for t in targets if not allowed(source, t))
    assert not wrong, f"{source} imports {wrong}"


def test_the_rule_itself_refuses():
    assert allowed("specrt.llm", "specrt.engine.engine") and allowed("specrt.draft.draft_model", "specrt.models.dense")
    assert allowed("specrt.engine.engine", "specrt.cache.pages") and allowed("specrt.draft.base", "specrt.round.state")
    for source, target in [("specrt.models.dense", "specrt.draft.base"), ("specrt.draft.base", "specrt.round.run"), ("specrt.layers.linear", "specrt.models.dense"),
                           ("specrt.ops", "specrt.layers.batch"), ("specrt.ops", "specrt.cache.pool"), ("specrt.weights.hf", "specrt.engine.engine"),
                           ("specrt.round.state", "specrt.models.dense"), ("specrt.engine.engine", "specrt.llm")]:
        assert not allowed(source, target), (source, target)


def test_only_ops_touches_the_extension():
    users = [module_name(p) for p in python_files("specrt") if "torch.ops" in p.read_text(encoding="utf-8")]
    assert users == ["specrt.ops"]


# --- csrc ---

KERNEL_ROOMS = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} - {"ops", "base", "ptx"}
NATIVE = {"base": {"base"}, "ptx": {"base", "ptx"}, "ops": {"base", "ops", *KERNEL_ROOMS},
          **{room: {"base", "ptx", room} for room in KERNEL_ROOMS}}


@pytest.mark.parametrize("path", native_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_includes_go_one_way(path):
    room = path.relative_to(ROOT / "csrc").parts[0]
    for name in includes(path):
        if re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", name):
            assert room == "ops", f"{path.name} includes {name}: torch stops at csrc/ops"
        elif name.endswith((".h", ".cuh")) and name.split("/")[0] in NATIVE:
            assert name.split("/")[0] in NATIVE[room], f"csrc/{room} includes {name}"
            assert (ROOT / "csrc" / name).is_file(), f"{path.name} includes {name}, which does not exist"
        elif name.endswith((".cuh", ".cpp", ".cu")) or (path.parent / name).is_file():
            raise AssertionError(f"{path.name} includes {name}: includes name the room")


def test_ops_compute_nothing_on_the_device():
    for path in native_files(".cpp", ".h"):
        if path.parent.name == "ops":
            assert not any(name.startswith("cuda") for name in includes(path)), f"{path.name}: CUDA calls belong to the kernels"


def test_sources_are_named_as_the_build_expects():
    """CMake takes *_cpu.cpp and *.cu of the kernel rooms: another name would silently not be built."""
    for path in native_files(".cpp"):
        room = path.parent.name
        assert room in ("ops", "base") or path.name.endswith("_cpu.cpp"), path


@pytest.mark.parametrize("path", bench_files(), ids=lambda p: p.name)
def test_benchmark_binaries_stand_on_the_kernels_library_alone(path):
    for name in includes(path):
        room = name.split("/")[0]
        assert not re.match(r"(torch|ATen|c10|pybind11)/|Python\.h|cublas", name), f"{path.name} includes {name}"
        if room in NATIVE:
            assert room in ("base", "ptx") or name == f"{room}/params.h", f"{path.name} includes {name}: kernels are called through their launchers"

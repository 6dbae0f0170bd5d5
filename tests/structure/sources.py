"""Reading the source tree: files, includes, imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def native_files(*suffixes: str) -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (suffixes or (".h", ".cpp", ".cu", ".cuh")))


def bench_files() -> list[Path]:
    """Sources of the benchmark binaries."""
    return sorted(p for p in (ROOT / "bench" / "native").rglob("*") if p.suffix in (".h", ".cpp", ".cu"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Full names of the modules of the package that a file imports, anywhere in it (``from a import b`` gives a.b where that is a module)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports name the whole module"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                file = ROOT.joinpath(*full.split("."))
                found.add(full if file.with_suffix(".py").is_file() or (file / "__init__.py").is_file() else node.module)
    return {name for name in found if name.split(".")[0] == "specrt"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.M)

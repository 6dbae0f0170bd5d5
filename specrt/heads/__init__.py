"""The draft heads that come with the package: a folder each, named TARGET-METHOD, as `specrt train` writes it: config.json, model.safetensors, and README.md, its card."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Name -> folder."""
    return {config.parent.name: config.parent for config in sorted(FOLDER.glob("*/config.json"))}


def shipped_for(target: str, method: str) -> str | None:
    """The name of the head that comes for ``target`` (what the user calls the model); None where there is none, or where the name is a folder here, which may hold any model."""
    name = f"{target}-{method}"
    return name if name in shipped() and not Path(target).exists() else None


def what_ships() -> str:
    """The end of a message that asks for a head: nothing where no head comes with the package."""
    names = ", ".join(map(repr, shipped()))
    return f"; with the package comes {names}" if names else ""

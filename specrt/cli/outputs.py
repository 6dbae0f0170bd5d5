"""Whether a command can write what it is asked to: said before the work, which may take hours. Found by trying; what is there stays as it is, and nothing is left of what was not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def check_file(file: str, make_folders: bool = False) -> None:
    """ValueError if ``file`` cannot be written. make_folders: the command makes those that it lies in."""
    _try(file, Path(os.path.realpath(file)), make_folders)


def check_folder(folder: str) -> None:
    """ValueError if no files can be made in ``folder``, which the command makes where there is none."""
    _try(folder, Path(os.path.realpath(folder)) / ".writable", make_folders=True)


def _try(name: str, path: Path, make_folders: bool) -> None:
    made: list[Path] = []
    try:
        if not make_folders and not path.parent.is_dir():
            raise ValueError(f"cannot write {name}: there is no such folder")
        for folder in reversed([f for f in path.parents if not f.exists()]):
            folder.mkdir()
            made.append(folder)
        if not path.exists():
            open(path, "xb").close()
            made.append(path)
        elif path.is_file() or path.is_dir():  # a pipe is not opened: its reader would see the end
            open(path, "ab").close()
    except OSError as error:
        raise ValueError(f"cannot write {name}: {error.strerror}") from None
    finally:
        for there in reversed(made):
            with suppress(OSError):  # another run has put something there
                there.unlink() if there == path else there.rmdir()

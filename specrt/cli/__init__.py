"""The shell: ``specrt generate | chat | bench | inspect | train``. Exit codes: 0 done, 1 a run failed, 2 bad input, or a file that cannot be read or written (one line on stderr), 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Callable, NoReturn

from specrt.cli import bench, chat, generate, inspect, train

COMMANDS = {"generate": generate, "chat": chat, "bench": bench, "inspect": inspect, "train": train}


class _Parser(argparse.ArgumentParser):
    """add_arguments: what a command has, added when it is the one that was chosen."""

    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if (add := self.add_arguments) is not None:
            self.add_arguments = None
            add(self)
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="specrt", description="Exact speculative decoding: the same tokens with speculation on or off, sooner.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments = module.add_arguments
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left (`specrt generate ... | head`): nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"specrt {args.command}: error: {' '.join(_said(error).split())}", file=sys.stderr)
        return 2


def _said(error: ValueError | OSError) -> str:
    """An OSError without its number: what is wrong, and with which file."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error)

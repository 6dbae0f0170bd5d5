"""Say what a checkpoint is, and whether it fits a target."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder, file or hub name")
    parser.add_argument("--target", metavar="MODEL", help="the model that a draft model or head is meant for")


def run(args: argparse.Namespace) -> int:
    from specrt.weights.inspect import describe

    print(describe(args.path, args.target))
    return 0

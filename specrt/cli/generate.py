"""Answer one prompt.

The prompt is the argument, --file PATH, or else what comes on standard input."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from specrt.cli import options, statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--file", metavar="PATH", help="read the prompt from a UTF-8 file")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message (with --chat)")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--json", action="store_true", help="print the whole output (text, tokens, logprobs, statistics), one JSON object a line")
    options.add_engine_arguments(parser)
    options.add_sampling_arguments(parser)


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise ValueError("give the prompt as an argument or as --file, not both")
    if args.file is not None:
        return options.read_text(args.file)
    if args.prompt is not None:
        return args.prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: byte {error.start} ({error.reason})") from None


def run(args: argparse.Namespace) -> int:
    if args.stream and args.json:
        raise ValueError("--stream and --json exclude each other")
    if args.stream and (args.n or 1) > 1:
        raise ValueError(f"--stream prints one sample, got --n {args.n}")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    prompt: Any = read_prompt(args)
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        prompt = [*system, {"role": "user", "content": prompt}]
    params = options.sampling(args)
    with options.load(args, requests=min(max(args.n or 1, 1), 8)) as llm:
        if args.stream:
            for piece in llm.stream(prompt, params, chat=args.chat):
                print(piece.text, end="", flush=True)
            print()
            return report_errors([piece.error])
        (output,) = llm.generate([prompt], params, chat=args.chat)
    outputs = output.samples or [output]
    for output in outputs:
        print(json.dumps(statistics.output_dict(output), ensure_ascii=False) if args.json else output.text)
    return report_errors([output.error for output in outputs])


def report_errors(errors: list[str | None]) -> int:
    """One line a failed request on standard error; the exit code."""
    failed = [error for error in errors if error is not None]
    for error in failed:
        print(f"specrt generate: {error}", file=sys.stderr)
    return 1 if failed else 0

"""Talk to a model; tokens that were drafted and accepted are coloured.

Type a message and press Enter. /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from specrt.cli import options, statistics

DRAFTED, PLAIN = "\x1b[32m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--no-colour", action="store_true", help="no colours, even on a terminal")
    options.add_engine_arguments(parser)
    options.add_sampling_arguments(parser)


def coloured(piece: Any, decode: Any) -> str:
    """The text of a piece with its drafted tokens in colour. A round emits its accepted drafts and then one token of the target's own: that token's text
    ends the piece, unless part of it is still held back (half a character), and then the whole piece counts as what most of it is."""
    if not piece.text or not any(piece.drafted):
        return piece.text
    own = next(i for i in range(len(piece.drafted), -1, -1) if i == 0 or piece.drafted[i - 1])
    tail = decode(piece.token_ids[own:]) if own < len(piece.token_ids) else ""
    if not piece.text.endswith(tail):
        tail = ""
    head = piece.text[: len(piece.text) - len(tail)]
    return f"{DRAFTED}{head}{PLAIN}{tail}"


def answer(llm: Any, messages: list[dict[str, str]], params: Any, colour: bool) -> str:
    """Streams one answer to standard output and returns its text; Ctrl-C ends it early and closing the stream frees the request."""
    text, tally = "", statistics.Tally()
    stream = llm.stream(messages, params, chat=True)
    try:
        for piece in stream:
            print(coloured(piece, llm.tokenizer.decode) if colour else piece.text, end="", flush=True)
            text += piece.text
            tally.add(piece)
            if piece.error is not None:
                print(f"\nspecrt chat: {piece.error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(PLAIN if colour else "", end="")
    finally:
        stream.close()
    print(f"\n\x1b[2m[{tally}]{PLAIN}" if colour else "")
    return text


def run(args: argparse.Namespace) -> int:
    try:
        import readline  # noqa: F401  line editing and history for input()
    except ImportError:
        pass
    colour = sys.stdout.isatty() and not args.no_colour
    if (args.n or 1) > 1:
        raise ValueError(f"a chat has one answer a message, got --n {args.n}")
    params = options.sampling(args, **({} if args.max_tokens is not None else {"max_tokens": 512}))
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    messages = list(system)
    with options.load(args, default_method="ngram") as llm:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            except UnicodeDecodeError as error:
                raise ValueError(f"standard input is not UTF-8 text: byte {error.start} ({error.reason})") from None
            if line == "/exit":
                return 0
            if line == "/reset":
                messages = list(system)
            elif line:
                try:
                    text = answer(llm, [*messages, {"role": "user", "content": line}], params, colour)
                except ValueError as error:  # a conversation grown past the model's length, say: this message is refused, the chat goes on
                    print(f"specrt chat: {error}", file=sys.stderr)
                    continue
                messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]

"""make demo: a real chat model answers a few prompts, streaming: with speculation off, with n-gram drafts, and with the EAGLE-3 head that comes with the package for it.
The answers must be the same, token by token."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from specrt import LLM, SamplingParams
from specrt.cli.prompts import BUILT_IN, Prompt, load_prompts
from specrt.cli.statistics import Tally
from specrt.heads import shipped_for

TITLES = {"ngram": "n-gram", "eagle3": "EAGLE-3"}


def stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> Tally:
    tally = Tally()
    for piece in llm.stream(prompt.messages, params, chat=True):
        tally.add(piece)
        print(piece.text, end="", flush=True)
        if piece.error is not None:
            sys.exit(f"\ndemo: {piece.error}")
    print("\n", flush=True)
    return tally


def shortened(text: str, width: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 20]} ... ({len(text)} characters)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--prompts", default=BUILT_IN)
    args = parser.parse_args()
    prompts = load_prompts(args.prompts)
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    print(f"loading {args.model} ...", flush=True)
    methods = ["ngram", *(["eagle3"] if shipped_for(args.model, "eagle3") else [])]
    greedy = {"temperature": 0.0, "max_tokens": args.max_tokens}
    modes = {"off": SamplingParams(**greedy, speculative=False)} | {name: SamplingParams(**greedy, speculative={"method": name}) for name in methods}
    answers: list[dict[str, Tally]] = []
    with LLM(args.model, device=args.device, max_batch_size=1, speculative_config={"method": methods[-1]}) as llm:  # n-gram drafts can always be asked for
        for params in modes.values():
            llm.generate("Hello", replace(params, max_tokens=8))  # warms up: the first request pays for thread pools and page faults
        for number, prompt in enumerate(prompts, 1):
            print(f"\n{bold}[{number}/{len(prompts)}] {prompt.id}{plain}: {shortened(prompt.text)}\n")
            found = {}
            for mode, params in modes.items():
                print(f"{bold}speculation off{plain}" if mode == "off" else f"{bold}speculation on ({TITLES[mode]}){plain}")
                found[mode] = stream(llm, prompt, params)
            answers.append(found)
            for mode, tally in found.items():
                print(f"  {TITLES.get(mode, mode):<8}{tally}" + ("" if mode == "off" else verdict(found["off"], tally)))
    return report(answers, list(modes), bold, plain)


def verdict(off: Tally, on: Tally) -> str:
    return f"; tokens/s x {on.tokens_per_s / off.tokens_per_s:.2f}, same output: {'yes' if off.token_ids == on.token_ids else 'NO'}"


def report(answers: list[dict[str, Tally]], modes: list[str], bold: str, plain: str) -> int:
    """All prompts together; the exit code."""
    tokens = sum(len(found["off"].token_ids) for found in answers)
    seconds = {mode: sum(found[mode].seconds for found in answers) for mode in modes}
    print(f"\n{bold}{len(answers)} prompts, {tokens} tokens, reading the prompts included:{plain}")
    failed = False
    for mode in modes:
        line = f"  {TITLES.get(mode, mode):<8}{seconds[mode]:6.1f} s, {tokens / seconds[mode]:6.1f} tokens/s"
        if mode != "off":
            same = sum(found["off"].token_ids == found[mode].token_ids for found in answers)
            line += f", {seconds['off'] / seconds[mode]:.2f} x off; identical outputs: {same} of {len(answers)}"
            failed |= same < len(answers)
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

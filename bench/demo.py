"""make demo: a real chat model answers a few prompts with speculation off and then on, streaming; the answers must be the same, token by token."""

from __future__ import annotations

import argparse
import sys

from specrt import LLM, SamplingParams
from specrt.cli.prompts import BUILT_IN, Prompt, load_prompts
from specrt.cli.statistics import Tally


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
    off_params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, speculative=False)
    on_params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    answers: list[tuple[Tally, Tally]] = []
    with LLM(args.model, device=args.device, max_batch_size=1, speculative_config={"method": "ngram"}) as llm:
        llm.generate("Hello", SamplingParams(max_tokens=2))  # warms up: the first request pays for thread pools and page faults
        for number, prompt in enumerate(prompts, 1):
            print(f"\n{bold}[{number}/{len(prompts)}] {prompt.id}{plain}: {shortened(prompt.text)}\n")
            print(f"{bold}speculation off{plain}")
            off = stream(llm, prompt, off_params)
            print(f"{bold}speculation on (n-gram){plain}")
            on = stream(llm, prompt, on_params)
            answers.append((off, on))
            print(f"  off:  {off}\n  on:   {on}\n  tokens/s x {on.tokens_per_s / off.tokens_per_s:.2f}; outputs identical: {'yes' if off.token_ids == on.token_ids else 'NO'}")
    off_seconds, on_seconds = (sum(pair[mode].seconds for pair in answers) for mode in (0, 1))
    same = sum(off.token_ids == on.token_ids for off, on in answers)
    tokens = sum(len(on.token_ids) for _, on in answers)
    print(f"\n{bold}{len(answers)} prompts, {tokens} tokens, reading the prompts included: {off_seconds:.1f} s with speculation off, {on_seconds:.1f} s with it on "
          f"({off_seconds / on_seconds:.2f} x); identical outputs: {same} of {len(answers)}{plain}")
    return 0 if same == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())

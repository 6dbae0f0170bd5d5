"""What of the drafts that are lost at T > 0 the noise costs, and what the texts: one round from each of many places of texts sampled at one temperature, decoded at another.

A text sampled at T = 1 is harder to draft than a greedy one whatever it is verified with, so the acceptance lengths of `specrt bench --acceptance` at two temperatures differ by both. Here
texts are sampled at each temperature; from every --every-th token of their answers on, the first round after the prompt is taken at each temperature, and its tokens counted.
Writes bench/results/contexts_<card>.json: a row for each pair, the rounds at T = 0 in the same places beside it."""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.results import Results, card, print_table  # noqa: E402
from specrt import LLM, SamplingParams  # noqa: E402
from specrt.cli.prompts import BUILT_IN, Prompt, load_prompts  # noqa: E402

TREE = {"method": "eagle3", "num_steps": 8, "eagle_topk": 10, "num_draft_tokens": 60}
TEMPERATURES = (0.0, 0.6, 1.0)


def contexts(llm: LLM, prompts: list[Prompt], temperature: float, tokens: int, every: int) -> list[list[int]]:
    """Prompts with the beginnings of their answers, as token ids."""
    params = [SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed) for seed in range(len(prompts))]
    outputs = llm.generate([prompt.messages for prompt in prompts], params, chat=True)
    return [output.prompt_token_ids + output.token_ids[:end] for output in outputs for end in range(every // 2, len(output.token_ids) - 1, every)]


def first_rounds(llm: LLM, prompts: list[list[int]], temperature: float) -> list[int]:
    """The tokens that the first round after each prompt gave."""
    most = TREE["num_steps"] + 1  # of a round
    streams = [llm.stream(prompt, SamplingParams(temperature=temperature, max_tokens=most, seed=seed)) for seed, prompt in enumerate(prompts)]
    counts = []
    for stream in streams:
        with stream:
            piece = next(stream)
        if piece.error:
            raise SystemExit(f"contexts: {piece.error}")
        counts.append(len(piece.token_ids))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--prompts", default=BUILT_IN, help="JSON lines with category and turns; the built-in ones if not given")
    parser.add_argument("--limit", type=int, help="prompts a category")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--every", type=int, default=8, help="tokens between two places (default: %(default)s)")
    args = parser.parse_args()
    prompts = load_prompts(args.prompts, limit=args.limit)
    results = Results(f"contexts_{card() if args.device == 'cuda' else 'cpu'}.json", args.device)
    with LLM(args.model, device=args.device, max_batch_size=16, max_model_len=2048, speculative_config=TREE) as llm:
        places = {t: contexts(llm, prompts, t, args.tokens, args.every) for t in TEMPERATURES}
        for text_t, round_t in product(TEMPERATURES, TEMPERATURES):
            counts = first_rounds(llm, places[text_t], round_t)
            if round_t == 0.0:
                greedy = counts
            shape = f"{args.model}, eagle3 tree of 60, {len(prompts)} prompts, texts of T = {text_t:g}, rounds at T = {round_t:g}"
            results.add("tokens of a round", shape, [mean(counts)], "tokens", "rounds at T = 0", mean(greedy), note=f"{len(counts)} places")
    results.write()
    print_table(results.rows)


if __name__ == "__main__":
    main()

"""What of the drafts that are lost at T > 0 the noise costs, and what the texts: one round from each of many places of texts sampled at one temperature, decoded at another.

    python bench/contexts.py --prompts prompts.jsonl

A text sampled at T = 1 is harder to draft than a greedy one whatever it is verified with, so the acceptance lengths of `specrt bench --acceptance` at two temperatures differ by both. Here
texts are sampled at each temperature; from every --every-th token of their answers on, the first round after the prompt is taken at each temperature, and its tokens counted: with
children drafted under shared noise, and with plain top-k children, which at T = 0 are the same ones and so are not measured there again.
Writes bench/results/contexts_<card>.json: a row for each pair, the rounds at T = 0 in the same places beside it; `evidence.py table` puts its table into bench/README.md."""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.results import Results, card, print_table  # noqa: E402
from specrt import LLM, SamplingParams  # noqa: E402
from specrt.cli.prompts import BUILT_IN, Prompt, load_prompts  # noqa: E402

BEGIN, END = "<!-- contexts: made from results/contexts_h100.json by evidence.py -->\n", "<!-- end of contexts -->"
TREE = {"method": "eagle3", "num_steps": 8, "eagle_topk": 10, "num_draft_tokens": 60}
MOST = TREE["num_steps"] + 1  # tokens of a round
SHARED, PLAIN = "tokens of a round", "tokens of a round, plain top-k children"
METHODS: dict[str, dict[str, Any]] = {SHARED: TREE, PLAIN: TREE | {"draft_sample_method": "greedy"}}  # by the names of their rows
TEMPERATURES = (0.0, 0.6, 1.0)
BATCH = {"cpu": 16, "cuda": 64}

Counts = dict[tuple[str, float, float], list[int]]  # (name, T of the texts, T of the rounds) -> the tokens of a round, by place


def contexts(llm: LLM, prompts: list[Prompt], temperature: float, tokens: int, every: int) -> list[list[int]]:
    """Prompts with the beginnings of their answers, as token ids."""
    params = [SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed) for seed in range(len(prompts))]
    outputs = llm.generate([prompt.messages for prompt in prompts], params, chat=True)
    return [output.prompt_token_ids + output.token_ids[:end] for output in outputs for end in range(every // 2, len(output.token_ids) - 1, every)]


def first_rounds(llm: LLM, prompts: list[list[int]], temperature: float) -> list[int]:
    """The tokens that the first round after each prompt gave."""
    streams = [llm.stream(prompt, SamplingParams(temperature=temperature, max_tokens=MOST, seed=seed)) for seed, prompt in enumerate(prompts)]
    counts = []
    for stream in streams:
        with stream:
            piece = next(stream)
        if piece.error:
            raise SystemExit(f"contexts: {piece.error}")
        counts.append(len(piece.token_ids))
    return counts


def measure(model: str, device: str, prompts: list[Prompt], tokens: int, every: int) -> Counts:
    places: dict[float, list[list[int]]] = {}
    counts: Counts = {}
    for name, config in METHODS.items():
        with LLM(model, device=device, max_batch_size=BATCH[device], max_model_len=2048, speculative_config=config) as llm:
            places = places or {t: contexts(llm, prompts, t, tokens, every) for t in TEMPERATURES}  # once: whatever drafts, these are the texts
            for text_t, round_t in product(TEMPERATURES, TEMPERATURES):
                if name == SHARED or round_t > 0:
                    counts[name, text_t, round_t] = first_rounds(llm, places[text_t], round_t)
    return counts


def add_rows(results: Results, what: str, counts: Counts) -> None:
    for (name, text_t, round_t), found in counts.items():
        error = stdev(found) / len(found) ** 0.5
        results.add(name, f"{what}, texts of T = {text_t:g}, rounds at T = {round_t:g}", [mean(found)], "tokens", "rounds at T = 0", mean(counts[SHARED, text_t, 0.0]),
                    note=f"{len(found)} places, standard error {error:.3f}")


def table(content: dict[str, Any]) -> str:
    """A table for each model and number of prompts. What was not measured for any texts has no column."""
    groups: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = {}
    for row in content["rows"]:
        what, text_t, round_t = row["shape"].replace("rounds at", "texts of").split(", texts of T = ")
        groups.setdefault(what, {})[row["name"], text_t, round_t] = row
    parts = [[f"{content['machine']}, {max(row['date'] for row in rows.values())}; {what}.", "", *grid(rows)] for what, rows in groups.items()]
    return "\n\n".join("\n".join(part) for part in parts) + "\n" if parts else "Not measured yet.\n"


def grid(rows: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    temperatures = [f"{t:g}" for t in TEMPERATURES]
    columns = [(name, t) for name, t in product(METHODS, temperatures) if any((name, text_t, t) in rows for text_t in temperatures)]
    titles = [f"rounds at T = {t}{name.removeprefix(SHARED)}" for name, t in columns]
    lines = ["| " + " | ".join(["texts", *titles]) + " |", "|---" * (1 + len(columns)) + "|"]
    for text_t in temperatures:
        found = [rows.get((name, text_t, t)) for name, t in columns]
        if any(found):
            lines.append(f"| T = {text_t} | " + " | ".join("" if row is None else f"{row['value']:.2f} ({row['ratio']:.2f})" for row in found) + " |")
    return lines


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
    add_rows(results, f"{args.model}, eagle3 tree of 60, {len(prompts)} prompts", measure(args.model, args.device, prompts, args.tokens, args.every))
    results.write()
    print_table(results.rows)


if __name__ == "__main__":
    main()

"""The figures of README.md, and the acceptance table of bench/README.md, from bench/results/: each block between two markers is made here. `evidence.py table` writes them, and a test compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.results import FOLDER  # noqa: E402

LINEAR = {f"{name}, {rows}": f"linear_{name.lower()}_m{rows}" for name, all_rows in (("bf16", (1, 8, 32, 64, 128, 256)), ("FP8", (1, 8, 32, 64, 128, 160, 256))) for rows in all_rows}
LINEAR |= {"bf16, 4096 (one layer)": "prefill_linear_bf16_m4096", "FP8, 4096 (one layer)": "prefill_linear_fp8_m4096"}
ROUNDS = {"greedy, batch 1, 1k positions (vLLM: 256)": "decode_step_b1_1k", "greedy, batch 8": "decode_step_b8_1k", "greedy, batch 32": "decode_step_b32_1k",
          "greedy, batch 32, FP8 keys and values": "decode_step_fp8kv_b32_1k", "greedy, batch 1, FP8 weights": "decode_step_fp8_b1_1k",
          "a tree of 64 nodes verified, batch 1, 1k positions": "verify_n64_b1_1k", "EAGLE-3 head, chain of 4, batch 1, 256 positions": "eagle3_chain4_b1",
          "the same, batch 8": "eagle3_chain4_b8", "the same, batch 32": "eagle3_chain4_b32", "EAGLE-3 head in FP8, tree of 60, batch 1": "eagle3_tree60_b1",
          "P-EAGLE head, chain of 4, batch 1": "peagle_chain4_b1", "MiMo-7B, greedy, batch 1": "mimo7b_decode_step_b1", "MiMo-7B with its MTP module, one draft": "mimo7b_mtp_round_b1",
          "Llama-3.2-1B, greedy, batch 1": "llama1b_decode_step_b1"}
DRAFTERS = {"EAGLE-3, chain of 4": "eagle3 chain of 4, smollm2-135m-eagle3", "the same in FP8": "eagle3 chain of 4, smollm2-135m-eagle3, quantization=fp8",
            "EAGLE-3, tree of 32 (6 x 8)": "eagle3 tree of 32 (6 x 8), smollm2-135m-eagle3", "EAGLE-3, tree of 60 (8 x 10)": "eagle3 tree of 60 (8 x 10), smollm2-135m-eagle3",
            "the same, plain top-k children": "eagle3 tree of 60 (8 x 10), smollm2-135m-eagle3, draft_sample_method=greedy", "MTP, chain of 3": "mtp chain of 3, smollm2-135m-mtp",
            "P-EAGLE, chain of 4 (does not ship)": "peagle chain of 4, smollm2-135m-peagle", "MEDUSA, chain of 4 (does not ship)": "medusa chain of 4, smollm2-135m-medusa",
            "n-gram, chain of 8": "ngram chain of 8"}
CATEGORIES = ("all", "chat", "code", "math", "summarisation", "rag_qa")
TEMPERATURES = (0.0, 0.6, 1.0)
SPOKEN = {"math": "mathematics", "code": "code", "rag_qa": "questions over a text", "chat": "chat", "summarisation": "summaries"}


def content(file: str) -> dict[str, Any]:
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


def gpu_rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in content("h100.json")["rows"]}


def number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def lines_of(head: str, rows: list[tuple[str, ...]]) -> str:
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


# --- SmolLM2 on the CPU ---


def cpu() -> str:
    given = content("cpu.json")
    own = [row for row in given["rows"] if "prompts_dev" not in row["shape"]]
    other = {(row["name"], row["shape"].split(", ")[-1], row["peer"]): row for row in given["rows"] if "prompts_dev" in row["shape"]}
    asked = [("plain decoding, all prompts", "decode, plain", "all", "transformers generate"), ("EAGLE-3 decoding, all prompts", "decode, EAGLE-3", "all", "specrt plain"),
             ("EAGLE-3 decoding, all prompts", "decode, EAGLE-3", "all", "transformers prompt lookup"), ("EAGLE-3 decoding, code alone", "decode, EAGLE-3", "code", "specrt plain"),
             ("EAGLE-3 decoding, chat alone", "decode, EAGLE-3", "chat", "specrt plain"), ("n-gram decoding, all prompts", "decode, n-gram", "all", "specrt plain"),
             ("n-gram decoding, summaries alone", "decode, n-gram", "summarisation", "specrt plain"), ("reading a prompt of 1000 tokens", "prefill", "1000 tokens", "transformers")]
    found = [(label, next(row for row in own if (row["name"], row["shape"].split(", ")[-1], row["peer"]) == tuple(key))) for label, *key in asked]
    rows = [(label, f"{row['value']:.0f} tokens/s", f"{row['peer']}: {row['peer_value']:.0f}", f"{row['ratio']:.2f}") for label, row in found]
    head, plain, lookup = (other[name, "all", peer] for name, peer in (("decode, EAGLE-3", "specrt plain"), ("decode, plain", "transformers generate"), ("decode, EAGLE-3", "transformers prompt lookup")))
    kinds = ", ".join(f"{SPOKEN[kind]} {other['decode, EAGLE-3', kind, 'specrt plain']['ratio']:.2f}" for kind in SPOKEN)
    others = head["shape"].split(", ")[-2].split(" ")[0]
    spread, dates = max(row["spread"] for _, row in found), max(row["date"] for _, row in found)
    return (f"{given['machine']}, {dates}; spreads are up to {spread:.0%}.\n\n" + lines_of("| | specrt | peer | ratio |", rows)
            + f"\nThe same over {others} other prompts, measured once: the head {head['value']:.0f} tokens/s, plain {head['peer_value']:.0f} ({head['ratio']:.2f} times; {kinds}), transformers "
            f"{plain['peer_value']:.0f},\n{lookup['peer_value']:.0f} with its prompt lookup.\n")


# --- an H100 ---


def linear() -> str:
    rows = gpu_rows()
    found = [(label, rows[name]) for label, name in LINEAR.items()]
    return lines_of("| rows | ms | share of the read bandwidth | cuBLAS, ms |", [(label, f"{r['value']:.2f}", number(r["share_of_floor"], ".2f"), number(r["peer_value"], ".2f")) for label, r in found])


def rounds() -> str:
    rows = gpu_rows()
    found = [(label, rows[name]) for label, name in ROUNDS.items()]
    return lines_of("| round | ms | what the bytes need | vLLM |", [(label, f"{r['value']:.2f}", f"{r['floor']:.2f}", number(r["peer_value"], ".3g")) for label, r in found])


def alone() -> str:
    rows = gpu_rows()
    value, peer = (lambda name, form: format(rows[name]["value"], form)), (lambda name, form, scale=1.0: format(rows[name]["peer_value"] / scale, form))
    ways = ("off", "ngram", "eagle3_chain4", "eagle3_tree60")
    prompts = rows["decode_off_b1"]["shape"].split(", ", 1)[1]
    one, eight = ([value(f"decode_{way}_b{batch}", ".0f") for way in ways] for batch in (1, 8))
    return (f"Drafting takes {value('eagle3_drafter_b1', '.2f')} ms a round with the EAGLE-3 head and {value('peagle_drafter_b1', '.2f')} with the P-EAGLE head, which has four layers: the drafts, and the "
            "round's commit, in which the head\nreads what was accepted.\n\n"
            f"Attention over 1k positions takes {value('decode_attention_b1_1k', '.1f')} us a layer for one decoded token (torch SDPA {peer('decode_attention_b1_1k', '.1f')}), "
            f"{value('verify_attention_n64_b1_1k', '.1f')} us for a 64-node tree (SDPA over the committed keys {peer('verify_attention_n64_b1_1k', '.1f')}),\n"
            f"a prompt of 4096 tokens {value('prefill_attention_4k', '.0f')} us (SDPA {peer('prefill_attention_4k', '.0f')}); its first token is there after {value('first_token_b1_4k', '.0f')} ms "
            f"(transformers' forward pass: {peer('first_token_b1_4k', '.0f')}).\n\n"
            f"SmolLM2 itself ({prompts}), prompts included, in us a token: at batch 1 plain {one[0]}, n-gram drafts {one[1]}, its EAGLE-3 head {one[2]} (chain of 4) and {one[3]} "
            f"(tree of 60);\nat batch 8 {eight[0]}, {eight[1]}, {eight[2]} and {eight[3]}. transformers, on the slow host of that GPU: {peer('decode_off_b1', '.1f', 1e3)} ms, "
            f"{peer('decode_ngram_b1', '.1f', 1e3)} with its prompt lookup, and at batch 8 {peer('decode_off_b8', '.1f', 1e3)}.\n")


# --- acceptance ---


def lengths() -> dict[tuple[str, float, str], float]:
    documents = [content(f"acceptance/smollm2-135m_h100{which}.json") for which in ("", "_trained")]
    return {(r["method"], r["temperature"], r["category"]): r["acceptance_length"] for document in documents for r in document["results"]}


def acceptance() -> str:
    of = lengths()
    columns = [*((t, "all") for t in TEMPERATURES), (0.0, "code"), (0.0, "chat")]
    return lines_of("| drafter | T = 0 | T = 0.6 | T = 1 | code, T = 0 | chat, T = 0 |", [(label, *(f"{of[method, *column]:.2f}" for column in columns)) for label, method in DRAFTERS.items()])


def acceptance_by_category() -> str:
    of = lengths()
    rows = [(label, *(" / ".join(f"{of[method, t, category]:.2f}" for t in TEMPERATURES) for category in CATEGORIES)) for label, method in DRAFTERS.items()]
    return lines_of(f"| drafter | {' | '.join(CATEGORIES)} |", rows)


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"figures on the CPU": cpu, "linear layers": linear, "rounds": rounds, "figures one by one": alone, "acceptance": acceptance},
    "bench/README.md": {"acceptance by category": acceptance_by_category},
}


def renewed(text: str, begin: str, between: str, end: str) -> str:
    """``text`` with what stands between two markers replaced."""
    before, rest = text.split(begin)
    return before + begin + between + end + rest.split(end)[1]


def with_figures(file: str, text: str) -> str:
    """``text`` of that file of the repository with the blocks of now."""
    for name, block in BLOCKS[file].items():
        text = renewed(text, f"<!-- {name}: made from results/ by evidence.py -->\n", block(), f"<!-- end of {name} -->")
    return text

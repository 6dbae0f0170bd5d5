"""SmolLM2-135M end to end on one GPU, speculation off and with n-gram drafts; writes bench/results/<card>.json. (Kernels: bench/native.)"""

from __future__ import annotations

import argparse
import time
from statistics import median

from results import Results, card, print_table

from specrt import LLM, SamplingParams


def end_to_end(results: Results, model: str) -> None:
    text = "Repeat this text. " + "The river Elbe rises in the Giant Mountains and flows to the North Sea; ships carry goods on it from Hamburg to Prague. " * 6
    params = SamplingParams(max_tokens=128, ignore_eos=True)
    for batch in (1, 8, 32):
        plain = None
        for name, spec in (("off", None), ("ngram", {"method": "ngram"})):
            with LLM(model, device="cuda", max_batch_size=batch, max_model_len=2048, speculative_config=spec) as llm:
                values = []
                for _ in range(4):
                    start = time.perf_counter()
                    outs = llm.generate([[{"role": "user", "content": text}]] * batch, params, chat=True)
                    values.append((time.perf_counter() - start) / sum(len(o.token_ids) for o in outs) * 1e6)
            results.add(f"decode_{name}_b{batch}", f"{model} bf16, a repeating text, 128 tokens each", values[1:], "us/token", plain and "specrt, off", plain)
            results.write()
            plain = plain or median(values[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    results = Results(f"{card()}.json", "cuda", unique=("name",))
    end_to_end(results, args.model)
    print_table(results.rows)


if __name__ == "__main__":
    main()

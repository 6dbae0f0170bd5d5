"""How many generated tokens were compared bit for bit, and how many differed: the exactness matrix at scale, on one machine.

    python bench/exactness.py --device cuda --model smollm2-135m --tokens 200 --requests 32
    python bench/exactness.py --device cuda --model llama-8b-random

Every request is generated plainly (all together, and a few of them alone), then again with every drafter, as chains and trees, chunked, with small pages
and too few of them; tokens and logprobs are compared with ==. Free pages hold NaN. Exits 1 on the first difference. Writes bench/results/exactness_<card>.json."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import load_file, save_file  # noqa: E402

import specrt.llm  # noqa: E402
import specrt.weights  # noqa: E402
from bench.results import Results, card  # noqa: E402
from bench.shapes import SHAPES  # noqa: E402
from specrt.draft import DRAFTERS  # noqa: E402
from specrt.heads import shipped, shipped_for  # noqa: E402
from specrt.models.config import ModelConfig  # noqa: E402
from specrt.train.new_head import write_new_head  # noqa: E402
from specrt.train.settings import Settings  # noqa: E402
from specrt.weights import open_checkpoint  # noqa: E402
from tests.invariance.matrix import answers, assert_same, cases, coverage, make  # noqa: E402
from tests.kit.replay import ReplayDrafter  # noqa: E402
from tests.kit.tiny import random_checkpoint  # noqa: E402

TREE = dict(num_steps=6, eagle_topk=4, num_draft_tokens=24)
LOOKUP = dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3)
HEADS = ("eagle3", "mtp", "peagle", "medusa")
VARIANTS: dict[str, tuple[dict, dict]] = {
    "ngram chain": (dict(**LOOKUP, num_speculative_tokens=7), {}),
    "ngram tree": (dict(**LOOKUP, **TREE), dict(page_size=16)),
    "replay chain": (dict(method="replay", num_speculative_tokens=12), {}),
    "replay chain of 63, chunks of 37": (dict(method="replay", num_speculative_tokens=63), dict(chunk=37, page_size=32)),
    "replay tree": (dict(method="replay", **TREE), {}),
    "replay tree of 64, few pages": (dict(method="replay", num_steps=20, eagle_topk=4, num_draft_tokens=64), dict(few_pages=True)),
    "draft model chain": (dict(method="draft_model", num_speculative_tokens=4), {}),
    "draft model tree": (dict(method="draft_model", num_steps=3, eagle_topk=3, num_draft_tokens=10), {}),
    "eagle3 chain": (dict(method="eagle3", num_speculative_tokens=4), dict(page_size=32)),
    "eagle3 chain in fp8, chunks of 37": (dict(method="eagle3", num_speculative_tokens=6, quantization="fp8"), dict(chunk=37)),
    "eagle3 tree of 60": (dict(method="eagle3", num_steps=8, eagle_topk=10, num_draft_tokens=60), dict(page_size=16)),
    "mtp chain": (dict(method="mtp", num_speculative_tokens=3), {}),
    "mtp tree": (dict(method="mtp", **TREE), dict(page_size=16)),
    "peagle chain": (dict(method="peagle", num_speculative_tokens=4), {}),
    "peagle tree": (dict(method="peagle", **TREE), dict(page_size=16)),
    "medusa chain": (dict(method="medusa", num_speculative_tokens=3), dict(chunk=37)),
    "medusa tree": (dict(method="medusa", num_steps=3, eagle_topk=4, num_draft_tokens=24), {}),
    "layerskip chain": (dict(method="layerskip", exit_layer=20, num_speculative_tokens=4), dict(page_size=32)),
    "layerskip tree": (dict(method="layerskip", exit_layer=20, **TREE), {}),
}


def write_heads(folder: Path, model: str) -> dict[str, str]:
    """Heads of the methods of which none ships, method -> folder. They accept something although nobody trained them: the EAGLE-3 head that ships as P-EAGLE's, whose first draft it makes,
    and MEDUSA's blocks before they have learned anything, which repeat what the target has just said."""
    source = shipped()[f"{model}-eagle3"]
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    tensors = {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()} | {"mask_hidden": tensors["fc.weight"].new_zeros(1, 1, tensors["fc.weight"].shape[1])}
    (folder / "peagle").mkdir()
    (folder / "peagle" / "config.json").write_text(json.dumps(config | {"architectures": ["PEagleDraftModel"], "mask_token_id": 0}))
    save_file(tensors, folder / "peagle" / "model.safetensors")
    write_new_head(folder / "medusa", Settings.make(dict(method="medusa", model=model, data=("none",), output=str(folder))), open_checkpoint(model), None)
    return {method: str(folder / method) for method in ("peagle", "medusa")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="smollm2-135m", help="a model, or llama-8b-random")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="generated by each request")
    parser.add_argument("--alone", type=int, default=4, help="requests also generated alone")
    parser.add_argument("--variants", nargs="*", default=None, metavar="TEXT", help="only the variants that contain one of these")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(a, Path(folder))
    return 0


def compare(a: argparse.Namespace, folder: Path) -> None:
    """folder: for heads that are made here."""
    random_weights = a.model == "llama-8b-random"
    if random_weights:
        checkpoint = random_checkpoint(ModelConfig.from_hf(SHAPES["llama-8b"]), device=a.device)
        specrt.weights.open_checkpoint = lambda model: checkpoint
    settings = dict(device=a.device, dtype=a.dtype, kv_cache_dtype=a.kv_cache_dtype, max_model_len=1024)
    plain = make(a.model, max_batch_size=a.requests, **settings)
    vocab = plain._engine.vocab_size
    batch = cases(a.requests, vocab, (1, 15, 17, 63, 64, 100, 250, 257, 300, 130), a.tokens)
    heads = {method: name for method in HEADS if (name := shipped_for(a.model, method))}
    if "eagle3" in heads:
        heads |= write_heads(folder, a.model)
    started = time.perf_counter()
    want = answers(plain, batch, together=True)
    print(f"plain, {a.requests} together: {time.perf_counter() - started:.1f} s", flush=True)
    compared = {"alone": a.alone * a.tokens}
    assert_same(answers(plain, batch[: a.alone], together=False), want[: a.alone], "alone")
    pages = plain._engine.config.num_pages
    page_bytes = 2 * plain._engine.round.pool.k[:, 0].numel() * plain._engine.round.pool.k.element_size()
    target = plain._engine.round.target
    plain.close()
    del plain

    results = Results(f"exactness_{card() if a.device == 'cuda' else 'cpu'}.json", a.device)
    shape = f"{a.model} {a.dtype}" + (", FP8 keys and values" if a.kv_cache_dtype == "fp8" else "")
    results.add("exactness, alone against together", shape, [0], "differing tokens", note=f"{a.alone} requests of {a.tokens} tokens")
    for name, (spec, extra) in VARIANTS.items():
        if a.variants and not any(text in name for text in a.variants):
            continue
        if spec["method"] in HEADS:
            if spec["method"] not in heads:
                continue
            spec = {**spec, "model": heads[spec["method"]]}
        if spec["method"] == "draft_model":
            if random_weights:
                continue  # a second 8B model adds nothing that SmolLM2 does not show
            spec = {**spec, "model": a.model}
        extra = dict(extra)
        if extra.pop("few_pages", False):
            extra["kv_cache_memory"] = pages // 3 * page_bytes

        def factory(config, **_):
            drafter = ReplayDrafter("tree" if config.is_tree else "chain", vocab)
            for case, answer in zip(batch, want):
                drafter.remember(case.params.seed, case.prompt, answer.token_ids)
            return drafter

        DRAFTERS["replay"] = factory
        started = time.perf_counter()
        load = specrt.models.dense.DenseModel.load
        specrt.models.dense.DenseModel.load = classmethod(lambda cls, *args: target)  # the weights are there already
        try:
            llm = make(a.model, max_batch_size=a.requests, speculative_config=spec, **settings, **extra)
        finally:
            specrt.models.dense.DenseModel.load = load
        with llm:
            assert_same(answers(llm, batch, together=True), want, name)
            seen = coverage(llm)
        del llm
        gc.collect()  # make() holds the round in a circle, and the pool with it
        compared[name] = a.requests * a.tokens
        results.add(f"exactness, {name}", shape, [0], "differing tokens",
                    note=f"{a.requests} requests of {a.tokens} tokens; {seen.accepted} of {seen.drafted} drafts accepted, to depth {sum(n > 0 for n in seen.accepted_per_pos)}; {seen.put_back} put back")
        print(f"{name}: {compared[name]} tokens equal; {seen.accepted} of {seen.drafted} drafts accepted, {seen.put_back} put back; "
              f"{time.perf_counter() - started:.1f} s", flush=True)
    results.write()
    print(f"{sum(compared.values())} tokens compared, none differs -> {results.path}")


if __name__ == "__main__":
    sys.exit(main())

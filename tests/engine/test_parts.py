"""Page allocator, pool size, stop strings, seeds, per-request speculation."""

import random
from types import SimpleNamespace

import pytest

from specrt.cache.pages import PageAllocator, pages_for, pool_pages
from specrt.config import EngineConfig, SpeculativeConfig
from specrt.engine.seeds import draw_seed, sample_seed, signed
from specrt.engine.speculation import Speculation, resolve
from specrt.engine.statistics import SpeculationCounts
from specrt.engine.stops import OutputText


def test_pages_are_handed_out_once_and_come_back():
    rng, allocator, held = random.Random(0), PageAllocator(23), []
    for _ in range(2000):
        if rng.random() < 0.5:
            count = rng.randrange(8)
            pages = allocator.allocate(count)
            assert (pages is None) == (count > 23 - sum(map(len, held)))
            if pages is not None:
                held.append(pages)
        elif held:
            allocator.free(held.pop(rng.randrange(len(held))))
        taken = [p for pages in held for p in pages]
        assert len(set(taken)) == len(taken) and set(taken) <= set(range(23)) and allocator.num_free == 23 - len(taken)


def test_freeing_twice_is_an_error():
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.free(pages)
    with pytest.raises(ValueError, match="not allocated"):
        allocator.free(pages)
    with pytest.raises(ValueError, match="at least 1"):
        PageAllocator(0)


def test_pool_pages():
    assert [pages_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert pool_pages(3, 100, 12, 16, 10, None) == 3 * 7
    assert pool_pages(3, 100, 12, 16, 10, 155) == 15
    assert pool_pages(3, 100, 12, 16, 10, 10**9) == 21
    with pytest.raises(ValueError, match="kv_cache_memory"):
        pool_pages(3, 100, 12, 16, 10, 9)


def pieces(text: str):
    """A detokenizer whose i-th push gives the i-th of space-separated pieces ("_" = no text yet)."""
    parts = iter(text.split("|"))
    return SimpleNamespace(push=lambda token: next(parts), flush=lambda: "?")


def run(text: str, stop: tuple[str, ...], min_tokens: int = 0):
    output, streamed = OutputText(pieces(text), stop), []
    stopped_at = None
    for i in range(text.count("|") + 1):
        if output.push(i, i >= min_tokens):
            stopped_at = i
            break
        streamed.append(output.take())
    output.finish()
    streamed.append(output.take())
    assert "".join(streamed) == output.text, "what was streamed is not the text"
    return output.text, stopped_at


@pytest.mark.parametrize("text, stop, min_tokens, want", [
    ("ab|cd|ef", (), 0, ("abcdef?", None)),
    ("ab|cd|ef", ("cd",), 0, ("ab", 1)),
    ("ab|cd|ef", ("bc",), 0, ("a", 1)),
    ("ab|cd|ef", ("bcde",), 0, ("a", 2)),
    ("ab|cd|ef", ("abcdef",), 0, ("", 2)),
    ("ab|cd|ef", ("bcx", "de"), 0, ("abc", 2)),
    ("abcd", ("d", "bc"), 0, ("a", 0)),  # the earliest in the text, not the first of the list
    ("a|b|a", ("a",), 1, ("ab", 2)),  # wholly before min_tokens: never
    ("xa|b|c", ("a", "abc"), 1, ("x", 2)),  # the long one begins before min_tokens and ends behind it
    ("a||b|", ("ab",), 0, ("", 2)),
    ("aa|aab", ("aab",), 0, ("aa", 1)),
    ("é|\n\n|x", ("\n\n",), 0, ("é", 1)),
])
def test_stop_strings(text, stop, min_tokens, want):
    assert run(text, stop, min_tokens) == want


def test_stop_strings_against_brute_force():
    rng = random.Random(1)
    for _ in range(3000):
        parts = ["".join(rng.choice("ab") for _ in range(rng.randrange(4))) for _ in range(6)]
        stop = tuple({"".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 3))})
        want = ("".join(parts) + "?", None)
        for i in range(6):
            whole = "".join(parts[: i + 1])
            if any(s in whole for s in stop):
                want = (whole[: min(whole.find(s) for s in stop if s in whole)], i)
                break
        assert run("|".join(parts), stop) == want


def test_text_is_held_back_only_while_it_may_begin_a_stop():
    output = OutputText(pieces("abc|st|op|x"), ("stay",))
    assert [(output.push(i, True), output.take())[1] for i in range(4)] == ["abc", "", "stop", "x"]


def test_sample_seeds():
    # splitmix64 of state 0 begins with these words (Vigna's reference implementation).
    assert [sample_seed(0, i) & (2**64 - 1) for i in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert sample_seed(-7, 0) == -7 and signed(2**64 - 1) == -1 and signed(2**63 - 1) == 2**63 - 1
    seeds = [sample_seed(s, i) for s in (-(2**63), -1, 0, 2**63 - 1) for i in range(100)]
    assert len(set(seeds)) == 400 and all(-(2**63) <= s < 2**63 for s in seeds)
    assert draw_seed() != draw_seed()


def test_counts_by_depth():
    counts = SpeculationCounts()
    counts.add_round([1, 1, 2, 3], 2)
    counts.add_round([1, 2], 0)
    counts.add_round([], 0)
    assert (counts.num_rounds, counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens) == (3, 2, 6, 2)
    assert counts.num_draft_tokens_per_pos == [3, 2, 1] and counts.num_accepted_tokens_per_pos == [1, 1, 0]
    assert counts.acceptance_length == 5 / 3 and counts.draft_acceptance_rate == 2 / 6


def engine_config(**speculative) -> EngineConfig:
    return EngineConfig(speculative=SpeculativeConfig.parse(speculative) if speculative else None)


DRAFT = dict(method="draft_model", model="m")
TREE = dict(DRAFT, num_steps=3, eagle_topk=4, num_draft_tokens=20)


@pytest.mark.parametrize("config, wish, want", [
    ({}, None, Speculation()), ({}, False, Speculation()), ({}, {"method": "ngram"}, Speculation("ngram", 8, 8)),
    (DRAFT, None, Speculation("draft_model", 4, 4)), (DRAFT, False, Speculation()), (DRAFT, {"num_speculative_tokens": 2}, Speculation("draft_model", 2, 2)),
    (DRAFT, {"method": "ngram", "num_speculative_tokens": 7}, Speculation("ngram", 7, 7)),
    (dict(method="ngram", num_speculative_tokens=12), {"num_speculative_tokens": 9}, Speculation("ngram", 9, 9)),
    (TREE, None, Speculation("draft_model", 19, 3)), (TREE, {"num_steps": 2}, Speculation("draft_model", 19, 2)),
    (TREE, {"num_draft_tokens": 3, "eagle_topk": 4}, Speculation("draft_model", 2, 2)), (TREE, {"num_speculative_tokens": 5}, Speculation("draft_model", 5, 3)),
    (TREE, {"method": "ngram", "num_speculative_tokens": 19}, Speculation("ngram", 19, 19)),
    (dict(DRAFT, num_steps=3, eagle_topk=4, rejection_sample_method="standard"), {"num_steps": 2}, Speculation("draft_model", 8, 2)),
])
def test_speculation_of_a_request(config, wish, want):
    assert resolve(wish, engine_config(**config)) == want


@pytest.mark.parametrize("config, wish, words", [
    ({}, {"num_speculative_tokens": 3}, "speculative_config"), ({}, {"method": "draft_model"}, "draft_model"), (DRAFT, {"method": "none"}, "none"),
    (DRAFT, {"num_speculative_tokens": 5}, "at most 4"), (DRAFT, {"num_draft_tokens": 5}, "chains"), (DRAFT, {"method": "ngram", "num_speculative_tokens": 9}, "at most 8"),
    (TREE, {"num_draft_tokens": 21}, "at most 20"), (TREE, {"num_speculative_tokens": 20}, "at most 19"), (TREE, {"num_steps": 4}, "at most 3"),
    (TREE, {"eagle_topk": 2}, "eagle_topk"), (dict(DRAFT, num_steps=3, eagle_topk=4, rejection_sample_method="standard"), {"num_draft_tokens": 5}, "exact"),
])
def test_speculation_that_does_not_fit(config, wish, words):
    with pytest.raises(ValueError, match=words):
        resolve(wish, engine_config(**config))

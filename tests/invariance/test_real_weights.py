"""The exactness matrix's core on the real default model: drafts that are accepted because they are good, not because a test planted them."""

from __future__ import annotations

import pytest

from tests.invariance.matrix import answers, assert_same, cases, coverage, make

TREE = dict(num_steps=3, eagle_topk=3, num_draft_tokens=8)
LOOKUP = dict(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3)


@pytest.fixture(scope="module")
def reference():
    found = {}

    def of(device):
        if device not in found:
            batch = cases(4, 49152, (9, 40, 66, 130), 24)
            with make("smollm2-135m", device=device, max_batch_size=1, max_model_len=512) as llm:
                found[device] = batch, answers(llm, batch, together=False)
        return found[device]

    return of


@pytest.mark.parametrize("spec", [dict(**LOOKUP, num_speculative_tokens=6), dict(**LOOKUP, **TREE), dict(method="draft_model", model="smollm2-135m", num_speculative_tokens=3),
                                  dict(method="draft_model", model="smollm2-135m", **TREE)])
def test_real_drafts_change_no_bit(device, reference, spec):
    batch, want = reference(device)
    with make("smollm2-135m", device=device, max_batch_size=3, max_model_len=512, chunk=50, page_size=32, speculative_config=spec) as llm:
        assert_same(answers(llm, batch, together=True), want, str(spec))
        seen = coverage(llm)
    assert seen.accepted > 0

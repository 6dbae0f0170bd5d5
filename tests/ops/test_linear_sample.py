"""lm_head's own choice of tokens: the bits of what it replaces, logits written and then sampled; and that the comparison would notice what could be wrong."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from specrt import ops
from tests.kit.compare import assert_bits, poisoned, rows
from tests.kit.sampling import gumbel64, ints, philox_words, tables, transform

BF16, F32 = torch.bfloat16, torch.float32
TEMPERATURES = [0.0, 1.0, 0.7, 2.5]  # a slot each


class Said(NamedTuple):
    token: Tensor
    status: Tensor
    logprob: Tensor


class Rows:
    """Rows before lm_head; row r is of slot r % B and its token will stand at position r + 101."""

    def __init__(self, x: Tensor, weight: Tensor, temperatures=TEMPERATURES):
        self.x, self.weight, self.device = x, weight, x.device.type
        self.packed = ops.pack_linear(weight)
        self.params = [dict(temperature=t) for t in temperatures]
        self.request, self.position = np.arange(len(x)) % len(temperatures), np.arange(len(x)) + 100
        self.seeds = [7 * b - 3 + (b << 40) for b in range(len(temperatures))]

    def temperature(self, r: int) -> float:
        return self.params[self.request[r]]["temperature"]

    def logits(self) -> Tensor:
        out = poisoned(len(self.x), len(self.weight), dtype=F32, device=self.device)
        ops.linear(self.x, self.packed, None, rows(len(self.x), self.device), out)
        return out

    def by_logits(self) -> Said:
        R, device = len(self.x), self.device
        token = poisoned(R, dtype=torch.int32, device=device)
        z, status = transform(self.logits(), self.params, self.request, self.position, seeds=self.seeds, token=token)
        lse, logprob, none = (poisoned(R, dtype=F32, device=device) for _ in range(3))
        ops.row_logprobs(z, token, rows(R, device), lse, logprob, none[:, None][:, :0].int(), none[:, None][:, :0])
        return Said(token, status, torch.where(status == ops.STATUS_OK, logprob, -torch.inf))

    def choose(self, used: int | None = None, first: int = 0, last: int | None = None, logprob: bool = True) -> Said:
        """Of rows [first, last), as many as ``used`` of them."""
        cut, device = slice(first, last), self.device
        x = self.x[cut]
        said = Said(*(poisoned(len(x), dtype=dtype, device=device) for dtype in (torch.int32, torch.int32, F32)))
        ops.linear_sample(x, self.packed, len(self.weight), rows(len(x) if used is None else used, device), ints(self.request[cut], device), ints(self.position[cut], device),
                          ints(self.seeds, device, torch.int64), tables(self.params, device)[0], said.token, said.status, said.logprob if logprob else None)
        return said


def assert_same(got: Said, want: Said) -> None:
    assert got.status.tolist() == want.status.tolist()
    assert got.token.tolist() == want.token.tolist()
    assert_bits(got.logprob, want.logprob)


def random_rows(count: int, vocab: int, depth: int, dtype: torch.dtype, device: str, spread: float = 3.0, **kwargs) -> Rows:
    weight = (spread / depth**0.5 * torch.randn(vocab, depth)).to(device, dtype)
    return Rows(torch.randn(count, depth).to(device, dtype), weight, **kwargs)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("vocab", [1, 3, 64, 65, 127, 128, 129, 1000, 1025, 16256, 16257, 16449])  # on CUDA bf16: two ranges of K up to 16256, one beyond
@pytest.mark.parametrize("count", [1, 2, 16, 17, 33, 64, 100])
def test_the_same_bits_as_through_logits(device, dtype, vocab, count):
    case = random_rows(count, vocab, 136, dtype, device)
    want = case.by_logits()
    assert (want.status == ops.STATUS_OK).all()
    assert_same(case.choose(), want)
    bare = case.choose(logprob=False)
    assert bare.token.tolist() == want.token.tolist() and bare.status.tolist() == want.status.tolist()


@pytest.mark.parametrize("vocab", [49152, 128256, 151936])
@pytest.mark.parametrize("dtype, count", [(BF16, 1), (BF16, 6), (BF16, 70), (BF16, 129), (F32, 3)])
def test_whole_vocabularies(device, dtype, vocab, count):
    if device == "cpu" and count > 6:
        pytest.skip("the CPU has one way for all row counts")
    case = random_rows(count, vocab, 64, dtype, device)
    assert_same(case.choose(), case.by_logits())


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("vocab", [1000, 16449])
def test_a_row_depends_on_itself_alone(device, dtype, vocab):
    case = random_rows(300, vocab, 72, dtype, device)
    whole = case.choose()
    assert_same(whole, case.by_logits())
    for first, last in [(0, 1), (5, 14), (299, 300), (100, 157), (17, 145)]:
        cut = slice(first, last)
        part = case.choose(first=first, last=last)
        assert_same(part, Said(*(t[cut] for t in whole)))
    part = case.choose(used=201)
    assert_same(Said(*(t[:201] for t in part)), Said(*(t[:201] for t in whole)))
    assert (part.token[201:] == -77777).all() and (part.status[201:] == -77777).all() and part.logprob[201:].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("vocab", [1000, 16449])
def test_the_lowest_token_of_equal_logits(device, dtype, vocab):
    """Row r's best logits are equal at the tokens of ties[r]: within four, across lanes, warps, halves of a block, blocks, and at the vocabulary's end."""
    ties = [(4, 5), (3, 4), (15, 16), (63, 64), (127, 128), (0, vocab - 1), (130, 260, 390), (128, 255), (255, 256), (vocab - 2, vocab - 1), (200, 999)]
    weight = 0.1 * torch.randn(vocab, 64)
    x = torch.zeros(len(ties), 64)
    for r, tokens in enumerate(ties):
        x[r, r] = 8.0
        fresh = [t for t in tokens if not any(t in before for before in ties[:r])]
        weight[list(tokens), r] = 1.0
        assert fresh or r == 8
    weight[:, len(ties):] = 0.0
    case = Rows(x.to(device, dtype), weight.to(device, dtype), temperatures=[0.0])
    z = case.logits()
    for r, tokens in enumerate(ties):
        assert (z[r] == z[r].max()).nonzero().flatten().tolist() == sorted(tokens)  # the highest, or any other block's, would be seen
    said = case.choose()
    assert said.token.tolist() == [min(tokens) for tokens in ties]
    assert_same(said, case.by_logits())


def test_the_comparison_sees_wrong_noise_and_wrong_orders(device):
    """What the choice must not be: noise of the input's position, of another seed or word; a log-sum-exp in another order; the untempered logit."""
    case = random_rows(64, 1000, 136, F32, device, spread=1.0, temperatures=[1.3])
    said, z = case.choose(), case.logits().cpu().double().numpy() / 1.3
    tokens = np.arange(1000)

    def chosen(seed: int, ahead: int, words: np.ndarray) -> list[int]:
        return [int(np.argmax(z[r] + gumbel64(philox_words(seed, int(case.position[r]) + ahead, words, ops.NOISE_SHARED)))) for r in range(64)]

    seed = case.seeds[0]
    assert said.token.tolist() == chosen(seed, 1, tokens)
    for wrong in (chosen(seed, 0, tokens), chosen(seed + 1, 1, tokens), chosen(seed, 1, tokens ^ 1), chosen(seed, 1, tokens + 128), z.argmax(-1).tolist()):
        assert said.token.tolist() != wrong
    logits, at = case.logits().cpu(), said.token.cpu().long()[:, None]
    scaled = logits / 1.3
    assert not torch.equal(torch.log_softmax(scaled, -1).gather(1, at)[:, 0], said.logprob.cpu())
    assert not torch.allclose(torch.log_softmax(logits, -1).gather(1, at)[:, 0], said.logprob.cpu(), atol=1e-2)
    assert torch.allclose(torch.log_softmax(scaled.double(), -1).gather(1, at)[:, 0].float(), said.logprob.cpu(), atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("vocab", [1000, 16449])
def test_rows_that_are_not_finite(device, dtype, vocab):
    """NaN in a row's input, an infinite logit in any place, overflow by the temperature: the row says so, and no other row notices."""
    weight, x = 0.3 * torch.randn(vocab, 64), torch.randn(24, 64)
    places = [0, 3, 63, 64, 127, 128, vocab - 1]
    x[:, :7] = 0.0
    for i, token in enumerate(places):
        weight[token, i] = 3e38
        x[2 * i + 1, i] = 9.0 if i % 2 else -9.0  # one logit of one row overflows to +inf or -inf
    x[20, 33] = float("nan")
    case = Rows(x.to(device, dtype), weight.to(device, dtype))
    said = case.choose()
    bad = [2 * i + 1 for i in range(7)] + [20]
    assert (said.status == ops.STATUS_NOT_FINITE).nonzero().flatten().tolist() == sorted(bad)
    assert all(said.token[r] == 0 and said.logprob[r] == -torch.inf for r in bad)
    assert_same(said, case.by_logits())

    huge = Rows(torch.full((4, 8), 1e37).to(device, dtype), torch.tensor([-1.0, 1.0])[:, None].expand(2, 8).repeat(vocab // 2, 1).to(device, dtype), [1e-3, 1.0])
    assert huge.choose().status.tolist() == [ops.STATUS_NOT_FINITE, ops.STATUS_OK] * 2
    assert_same(huge.choose(), huge.by_logits())
    low = Rows(torch.full((2, 8), 1e37).to(device, dtype), -torch.ones(vocab, 8).to(device, dtype), [1e-3, 0.0])
    assert low.choose().status.tolist() == [ops.STATUS_ALL_MASKED, ops.STATUS_OK]
    assert_same(low.choose(), low.by_logits())


def test_arguments_are_checked(device):
    case = random_rows(4, 130, 64, F32, device)
    with pytest.raises(RuntimeError, match="out_features"):
        case.weight = case.weight[:0]
        case.choose()
    case = random_rows(4, 130, 64, F32, device)
    case.request = case.request[:2]
    with pytest.raises(RuntimeError, match="row_request"):
        case.choose()

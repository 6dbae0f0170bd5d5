"""One LLM and many threads: their requests share the batch, nobody waits longer than he must, and nobody hangs, whatever a step or a caller does.

What is counted is steps, not seconds: ``Steps`` makes a step last until somebody stands at the door, or has done what the step waits for."""

import gc
import signal
import threading
import time
from collections.abc import Callable

import pytest

from specrt import SamplingParams
from specrt import llm as llm_module
from specrt.engine.turns import Turns
from specrt.llm import LLM
from tests.engine.fake import VOCAB, FakeRound, assert_idle, make_engine, reference

PATIENCE = 20.0  # seconds until a test says that something hangs


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.0002)


def together(*works: Callable[[], object]) -> list:
    """What each returned, or raised, in a thread of its own."""
    results: list = [None] * len(works)

    def run(i: int) -> None:
        try:
            results[i] = works[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


@pytest.fixture(params=[0, 1], ids=["read at once", "read late"])
def make(monkeypatch, request):
    monkeypatch.setattr(FakeRound, "lookahead", request.param)

    def made(max_batch_size: int = 3) -> LLM:
        monkeypatch.setattr(llm_module, "load_engine", lambda model, config: make_engine(max_batch_size=max_batch_size))
        return LLM("fake")

    return made


class Steps:
    """The steps of an LLM: how many requests each had in the batch. ``wait``: what a step waits for before it ends."""

    def __init__(self, llm: LLM, wait: Callable[[], None] = lambda: None):
        self.llm, self.wait, self.sizes = llm, wait, []
        self._step, llm._engine.step = llm._engine.step, self

    def __call__(self):
        events = self._step()
        self.sizes.append(len(self.llm._engine.scheduler.running))
        self.wait()
        return events

    @property
    def taken(self) -> int:
        """Requests that are in or waiting, or were, where each prompt has one token."""
        return self.llm._engine.totals.prompt_tokens

    def knock(self) -> None:
        wait_for(self.llm._turns._door.locked, "a visitor")


def plain(**kw) -> SamplingParams:
    """A token a step."""
    return SamplingParams(**{"speculative": False, "seed": 1, "max_tokens": 100} | kw)


@pytest.mark.parametrize("streams", [0, 1, 3])
def test_threads_share_the_batch(make, streams):
    llm = make()
    steps = Steps(llm, lambda: steps.taken < 3 and steps.knock())

    def work(i: int) -> list[int]:
        if i < streams:
            return [t for piece in llm.stream([i + 1], plain(seed=i)) for t in piece.token_ids]
        return llm.generate([i + 1], plain(seed=i))[0].token_ids

    assert together(*(lambda i=i: work(i) for i in range(3))) == [reference(i, [i + 1], 100) for i in range(3)]
    assert len(steps.sizes) <= 110 and steps.sizes.count(3) >= 90, steps.sizes
    assert_idle(llm._engine)


def test_many_threads_and_few_slots(make):
    llm = make()
    stop = threading.Event()

    def work(i: int) -> list[int]:
        if i % 2:
            return [t for piece in llm.stream([i + 1], plain(seed=i, max_tokens=25, speculative=None)) for t in piece.token_ids]
        return llm.generate([i + 1], plain(seed=i, max_tokens=25))[0].token_ids

    def abandon() -> None:
        while not stop.is_set():
            with llm.stream([5], plain()) as stream:
                next(stream)
            llm.metrics()

    def all_done() -> list:
        try:
            return together(*(lambda i=i: work(i) for i in range(8)))
        finally:
            stop.set()

    results, _ = together(all_done, abandon)
    assert results == [reference(i, [i + 1], 25) for i in range(8)]
    assert_idle(llm._engine)


def test_a_visitor_waits_for_two_steps_at_most(make):
    llm = make()
    over = threading.Event()
    steps = Steps(llm, lambda: wait_for(lambda: llm._turns._door.locked() or over.is_set(), "a visitor"))

    def visits() -> list[int]:
        wait_for(lambda: bool(steps.sizes), "the first step")
        counts = [len(steps.sizes)]
        for _ in range(50):
            assert llm.metrics()["specrt:num_requests_running"] == 1
            counts.append(len(steps.sizes))
        over.set()
        return counts

    (out,), counts = together(lambda: llm.generate([1], plain(max_tokens=200)), visits)
    assert out.error is None and max(after - before for before, after in zip(counts, counts[1:])) <= 2, counts


def test_a_short_request_is_served_beside_a_long_one(make):
    llm = make()
    back, finished = threading.Event(), [0]

    def wait() -> None:
        if steps.taken < 2:
            steps.knock()
        if finished[-1]:
            wait_for(back.is_set, "the short request's caller to have his answer while the next step runs")
        finished.append(llm._engine.totals.finished["length"])

    def short() -> list[int]:
        wait_for(lambda: bool(steps.sizes), "the first step")
        (out,) = llm.generate([2], plain(max_tokens=4))
        back.set()
        return out.token_ids

    steps = Steps(llm, wait)
    (long,), tokens = together(lambda: llm.generate([1], plain(max_tokens=200)), short)
    assert long.token_ids == reference(1, [1], 200) and tokens == reference(1, [2], 4)
    assert len(steps.sizes) <= 205 and finished.index(1) <= 10, "it waited for a slot"


def test_pieces_are_there_while_another_thread_steps(make):
    """A queued stream has its thread step for long; the running one's consumer gets a piece a step all the same."""
    llm = make(max_batch_size=1)
    running = llm.stream([1], plain())
    next(running)
    stepping = threading.Event()

    def fetched() -> None:
        stepping.set()
        if running.output is None:
            wait_for(lambda: not running.pieces, "the piece to be fetched")

    Steps(llm, fetched)
    queued = llm.stream([2], plain(max_tokens=3))

    def consume() -> list[int]:
        wait_for(stepping.is_set, "the other thread's step")
        tokens = []
        while running.output is None:
            wait_for(lambda: bool(running.pieces), "a piece")
            tokens += next(running).token_ids
        return tokens

    tokens, pieces = together(consume, lambda: list(queued))
    assert tokens == reference(1, [1], 100)[-len(tokens) :] and len(tokens) >= 98 and sum(len(piece.token_ids) for piece in pieces) == 3
    assert_idle(llm._engine)


@pytest.mark.parametrize("call", [
    lambda llm, stream: llm.metrics(), lambda llm, stream: llm.generate("a"), lambda llm, stream: llm.stream("a"), lambda llm, stream: llm.close(),
    lambda llm, stream: next(stream)], ids=["metrics", "generate", "stream", "close", "next"])
def test_a_callback_that_calls_its_llm_is_told_so(make, call):
    llm = make()
    stream = llm.stream([3], plain())

    def mask(path: list[int]) -> list[bool]:
        while stream.pieces:
            next(stream)
        call(llm, stream)
        return [True] * VOCAB

    ((out,),) = together(lambda: llm.generate([1], plain(token_mask=mask)))
    assert out.finish_reason == "error" and "token_mask failed at output token 0: RuntimeError: this LLM was called from inside" in out.error
    assert len(llm.generate([1], plain())[0].token_ids) == 100
    stream.close()
    llm.generate("a", plain(max_tokens=1))
    assert_idle(llm._engine)


def test_a_stream_may_be_closed_or_collected_within_a_step(make):
    llm = make()
    streams = [llm.stream([3], plain()), llm.stream([4], plain())]
    next(streams[1])

    def mask(path: list[int]) -> list[bool]:
        if streams:
            streams[0].close()
            streams.clear()
            gc.collect()
        return [True] * VOCAB

    ((out,),) = together(lambda: llm.generate([1], plain(token_mask=mask)))
    assert out.error is None and len(out.token_ids) == 100 and llm._engine.totals.finished["abort"] == 2
    assert_idle(llm._engine)


def test_closing_ends_every_thread(make):
    llm = make(max_batch_size=1)
    steps = Steps(llm)
    steps.wait = lambda: steps.knock()  # every step lasts until a visitor comes: the requests, then close()

    def close() -> None:
        wait_for(lambda: len(llm._turns._waiting) == 3, "three threads that wait")
        llm.close()

    *results, _ = together(*[lambda: llm.generate([1], plain())] * 2, lambda: list(llm.stream([1], plain())), close)
    assert all(isinstance(error, RuntimeError) and "closed" in str(error) for error in results), results


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_where_one_step_fails_the_next_thread_goes_on(error):
    turns, steps = Turns(), []

    def step() -> None:
        steps.append(threading.get_ident())
        if len(steps) == 1:
            wait_for(lambda: len(turns._waiting) == 3, "three threads that wait")
            raise error("the first step")

    def work() -> str:
        try:
            turns.until(lambda: len(steps) >= 5, step)
            return "done"
        except error:
            return "failed"

    assert sorted(together(work, work, work)) == ["done", "done", "failed"]
    assert len(steps) == 5 and len(set(steps)) == 2 and not turns._waiting and not turns.mine
    assert turns.visit(lambda: turns.mine)


def test_an_interrupt_while_another_thread_steps():
    turns, steps, interrupted = Turns(), [], threading.Event()
    main = threading.get_ident()

    def step() -> None:
        if not steps:
            wait_for(lambda: len(turns._waiting) == 2, "the main thread")
            time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)
            wait_for(interrupted.is_set, "the interrupt")
        steps.append(1)

    other = threading.Thread(target=turns.until, args=(lambda: len(steps) == 3, step), daemon=True)
    other.start()
    wait_for(lambda: bool(turns._waiting), "the other thread")
    with pytest.raises(KeyboardInterrupt):
        turns.until(lambda: len(steps) == 3, step)
    interrupted.set()
    other.join(PATIENCE)
    assert not other.is_alive() and len(steps) == 3 and not turns._waiting
    turns.until(lambda: len(steps) == 5, step)

"""Turns: many threads, one engine. One thread is in at a time: for a step, or for a short visit (a request comes or goes, counters are read).

Threads that wait for tokens need the same thing, the next step: the first of them makes it, for all, and the others sleep until theirs is done or they
are the first. So a step costs no change of thread, and a batch of many callers runs as one call would run it. A visitor waits for the step that runs, at most for one more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Holds only plain locks, each in a ``with``, so that a KeyboardInterrupt leaves none of them taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held by who is in
        self._door = threading.Lock()  # held by the visitor who is next, until he leaves: who steps looks here before he goes in again, or nobody else would get in
        self._inside: int | None = None  # the thread that is in
        self._waiting: list[tuple[Callable[[], bool], SimpleQueue]] = []  # the first one steps

    @property
    def mine(self) -> bool:
        """Whether this thread is in already: this is a callback of a step, or the collector."""
        return self._inside == threading.get_ident()

    def visit(self, action: Callable[[], T]) -> T:
        """action(), between two steps."""
        self._refuse_mine()
        with self._door, self._lock:
            return self._enter(action)

    def until(self, done: Callable[[], bool], step: Callable[[], None]) -> None:
        """Returns when done() is true, which is asked after each step, by whichever thread made it. An exception of ``step`` is the stepping thread's; the next one goes on."""
        self._refuse_mine()
        me = (done, SimpleQueue())  # what wakes it up
        try:
            self._waiting.append(me)
            if self._waiting[0] is not me:
                me[1].get()
            while not done():  # nobody else steps now
                with self._door:
                    pass
                with self._lock:
                    self._enter(step)
                for is_done, bell in self._waiting[1:]:
                    if is_done():
                        bell.put(None)
        finally:
            if me in self._waiting:
                self._waiting.remove(me)
            for _, bell in self._waiting[:1]:
                bell.put(None)

    def _enter(self, action: Callable[[], T]) -> T:
        self._inside = threading.get_ident()
        try:
            return action()
        finally:
            self._inside = None

    def _refuse_mine(self) -> None:
        if self.mine:
            raise RuntimeError("this LLM was called from inside one of its own steps, by a token_mask for example, and would wait for itself for ever; "
                               "call it outside of the callback, or use another LLM there")

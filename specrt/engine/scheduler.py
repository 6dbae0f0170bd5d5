"""Scheduler: who is in which slot, and whose pages are whose. Host only, no tensors; the engine tells the round what was decided here.

First come, first served: only the head of the queue may enter, and when pages run out it is the latest arrival that is put back. The earliest request can
therefore always grow to its end, because a request that could not fit alone is refused before it is taken."""

from __future__ import annotations

from collections import deque

from specrt.cache.pages import PageAllocator, pages_for
from specrt.engine.request import Request


class Scheduler:
    """slack: positions past the committed length that a slot's pages must cover before a round. ahead: positions reserved beyond that, where there are
    pages: two rounds' worth, so that growing is rare."""

    def __init__(self, max_batch_size: int, num_pages: int, page_size: int, slack: int, ahead: int):
        self.slots: list[Request | None] = [None] * max_batch_size
        self.waiting: deque[Request] = deque()
        self.allocator = PageAllocator(num_pages)
        self.page_size, self.slack, self.ahead = page_size, slack, ahead
        self._arrivals = 0

    @property
    def running(self) -> list[Request]:
        """Requests in slots, by arrival."""
        return sorted((r for r in self.slots if r is not None), key=lambda r: r.number)

    def most_pages(self, request: Request) -> int:
        """What the request may come to need; it holds pages up to this."""
        return pages_for(request.longest + self.slack, self.page_size)

    def add(self, request: Request) -> None:
        request.number = self._arrivals
        self._arrivals += 1
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Moves waiting requests into free slots while there are pages for all they have so far and the rounds ahead."""
        entered = []
        while self.waiting and None in self.slots:
            request = self.waiting[0]
            pages = self.allocator.allocate(self._wanted(request))
            if pages is None:
                break
            self.waiting.popleft()
            request.slot, request.pages = self.slots.index(None), pages
            self.slots[request.slot] = request
            entered.append(request)
        return entered

    def reserve(self, may_put_back: bool) -> tuple[list[Request], list[tuple[int, Request]], bool]:
        """Before a round: pages for every active request. Returns those whose pages grew, those put back with the slot they had, and whether all are covered:
        False only where nobody may be put back."""
        grown: list[Request] = []
        put_back: list[tuple[int, Request]] = []
        for request in self.running:
            while request.active and not self._covers(request):
                if self._grow(request):
                    grown.append(request)
                    break
                if not may_put_back:
                    return grown, put_back, False
                latest = self.running[-1]
                put_back.append((latest.slot, latest))
                self._leave(latest)
                self.waiting.appendleft(latest)
        return grown, put_back, True

    def remove(self, request: Request) -> None:
        """The request is done or aborted: its slot and pages are free, wherever it stood."""
        if request.slot is not None:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def prompt_spans(self, rows: int) -> list[tuple[Request, int, int]]:
        """The next chunk: (request, start, end) of at most ``rows`` tokens together, the earliest arrivals first."""
        spans = []
        for request in self.running:
            length = min(request.committed - request.prefilled, rows)
            if not request.active and length > 0:
                spans.append((request, request.prefilled, request.prefilled + length))
                rows -= length
        return spans

    def _pages(self, request: Request, ahead: int) -> int:
        """Pages for the next round, and ``ahead`` positions more. A request never commits past its longest length, however late the host reads."""
        return min(pages_for(request.committed + request.in_flight + self.slack + ahead, self.page_size), self.most_pages(request))

    def _wanted(self, request: Request) -> int:
        return self._pages(request, self.ahead)

    def _covers(self, request: Request) -> bool:
        return len(request.pages) >= self._wanted(request)

    def _grow(self, request: Request) -> bool:
        """More pages, with the reserve if there are enough; True if the next round is covered."""
        for count in (self._wanted(request), self._pages(request, 0)):
            pages = self.allocator.allocate(max(count - len(request.pages), 0))
            if pages is not None:
                request.pages = request.pages + pages
                return True
        return False

    def _leave(self, request: Request) -> None:
        self.slots[request.slot] = None
        self.allocator.free(request.pages)
        request.leave_slot()

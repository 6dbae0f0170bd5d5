"""PageAllocator: which pages of the KV pool are whose. Host only; the pools themselves are on the device (pool.py)."""

from __future__ import annotations


class PageAllocator:
    """Page ids 0 .. num_pages-1. A page freed last is taken first: it is the one most likely still in a cache, and a stale read of it shows soonest in tests."""

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages = {num_pages} is not valid: it must be at least 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, or None (and nothing taken) if there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        for page in pages:
            if page not in self._taken:
                raise ValueError(f"page {page} is freed but was not allocated")
            self._taken.remove(page)
            self._free.append(page)


def pages_for(slots: int, page_size: int) -> int:
    """Pages that hold ``slots`` positions."""
    return -(-slots // page_size)


def pool_pages(max_batch_size: int, max_model_len: int, slack: int, page_size: int, bytes_per_page: int, memory: int | None) -> int:
    """Pages of an engine's pool: enough for every slot at max_model_len with its uncommitted rows, or as many as ``memory`` bytes hold if that is less."""
    most = max_batch_size * pages_for(max_model_len + slack, page_size)
    if memory is None:
        return most
    fit = memory // bytes_per_page
    if fit < 1:
        raise ValueError(f"kv_cache_memory = {memory} bytes hold no page: a page of {page_size} positions takes {bytes_per_page} bytes")
    return min(most, fit)

"""OutputText: the text of a growing output, and where a stop string cuts it."""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class OutputText:
    """Text token by token. ``text`` is all of it so far; ``take`` hands out what can no longer be cut away.

    detokenizer: None for a model without a tokenizer (the text stays empty)."""

    def __init__(self, detokenizer: Detokenizer | None, stop: tuple[str, ...]):
        self._detokenizer, self._stop = detokenizer, stop
        self.text = ""
        self._taken = 0
        self._ended = False

    def push(self, token: int, may_stop: bool) -> bool:
        """Adds a token's text. True if it completes a stop string (the text is then cut before it and complete). may_stop: False below min_tokens: a stop
        string that lies wholly in the text so far does not count later either."""
        if self._detokenizer is None:
            return False
        before = len(self.text)
        self.text += self._detokenizer.push(token)
        return may_stop and self._cut(before)

    def finish(self) -> None:
        """The output ended other than by a stop string: unfinished bytes become U+FFFD, held-back text is text."""
        if self._detokenizer is not None and not self._ended:
            self.text += self._detokenizer.flush()
        self._ended = True

    def take(self) -> str:
        """The text since the last call, without a tail that may turn out to begin a stop string."""
        safe = len(self.text) if self._ended else len(self.text) - self._held_back()
        piece = self.text[self._taken : safe]
        self._taken = max(self._taken, safe)
        return piece

    def _cut(self, before: int) -> bool:
        """Cuts at the earliest stop string that has at least one character past ``before``."""
        found = [at for s in self._stop if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0]
        if not found:
            return False
        self.text = self.text[: min(found)]
        self._ended = True
        return True

    def _held_back(self) -> int:
        """Length of the longest tail that is a proper beginning of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        return next((n for n in range(min(longest, len(self.text)), 0, -1) if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)

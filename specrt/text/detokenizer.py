"""IncrementalDetokenizer: text from tokens one at a time, never half a character."""

from __future__ import annotations

from collections.abc import Callable

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
_MOST_UNFINISHED = 3  # bytes of a character without its last


class IncrementalDetokenizer:
    """The pieces that ``push`` and the final ``flush`` return, joined, are the decoded text.

    A token alone decodes differently than after its neighbours (leading spaces, characters spread over tokens), so each step decodes a short window
    that begins at the previous piece's tokens and returns what is new in it."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._last = 0  # the window's tokens before this one have been returned whole
        self._sent = 0  # characters of the window's text that have been returned

    def push(self, token: int) -> str:
        """The text that this token completes: often a word, "" while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        finished = len(text.rstrip(_UNFINISHED))
        complete = finished == len(text)
        piece = text[self._sent : max(finished, len(text) - _MOST_UNFINISHED)]
        self._sent += len(piece)
        if complete and piece:
            self._window = self._window[self._last :]
            self._last = len(self._window)
            self._sent = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """What is left at the end of the text: unfinished bytes as U+FFFD."""
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece

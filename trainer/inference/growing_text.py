"""The text of a sample while its tokens come: what may be shown already, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character, perhaps not yet


class GrowingText:
    """A prompt's text with its continuation. `stops`: texts that end the continuation and are no part of it."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int], stops: Sequence[str]) -> None:
        self.decode = decode
        self.prompt = prompt
        self.stops = stops
        self.text = decode(prompt)
        self.stopped = False
        self._start = len(self.text.rstrip(UNFINISHED))  # of the continuation
        self._shown = 0

    def update(self, new: list[int]) -> bool:
        """Take the new tokens so far; return True once a stop text has ended them."""
        self.text = self.decode(self.prompt + new)
        found = [i for stop in self.stops if (i := self.text.find(stop, self._start)) >= 0]
        if found:
            self.stopped, self.text = True, self.text[: min(found)]
        return self.stopped

    def certain(self) -> str:
        """The text not returned before that no further token can change or end."""
        end = len(self.text.rstrip(UNFINISHED))
        own = self.text[self._start : end]
        return self._take(end - max((_overlap(own, stop) for stop in self.stops), default=0))

    def rest(self) -> str:
        """The text not returned before, once the sample is done."""
        return self._take(len(self.text))

    def _take(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`, and may be all that has come of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

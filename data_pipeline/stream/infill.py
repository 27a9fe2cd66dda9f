"""Fill in the middle (Bavarian et al. 2022): texts rearranged, so that a model learns to write between two others.

    <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle <|endoftext|>

A window holds pieces of documents, and each is rearranged within its own bounds or not at all: no other piece moves,
and the window keeps its length. The three tokens take the room of the piece's last three ids, which are left out. A
piece that a window cuts off has no end-of-text token: its length is drawn, an end-of-text token is put there, which
takes the room of one more id, and the rest of the piece follows as it is. So the middle ends at every place of a
window, also where documents are longer than windows: a model that only sees full ones cannot fill in a short text.

Every draw is an output of SplitMix64 whose seed is (seed, use, position of the window in the run), so that a window is
the same on any number of ranks and after a kill, and is cut anew in each epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_pipeline.order.permutation import outputs
from data_pipeline.tokenizer.vocabularies import EOT, INFILL

LEAST = 8  # ids of the shortest piece that is rearranged: four of text, four of marks and the end
_MARKS = LEAST // 2
_WINDOWS, _EXAMPLES = 4, 5  # the uses, beside those of epochs.py and data_pipeline/examples/rows.py


@dataclass(frozen=True)
class Infill:
    """Rearranges a share `rate` of texts. The others are ids: of the three tokens, and of the end of a text."""

    rate: float
    seed: int
    prefix: int
    suffix: int
    middle: int
    end: int

    @classmethod
    def of(cls, rate: float, seed: int, ids: Mapping[str, int]) -> Infill:
        """From the ids of `INFILL` and of the end of a text."""
        return cls(rate, seed, *(ids[token] for token in (*INFILL, EOT)))

    def windows(
        self, text: np.ndarray, row: np.ndarray, cut: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rearrange pieces of windows, in place.

        Args:
            text: [n, tokens], of a dtype that has room for the ids of the tokens.
            row, cut: token `cut` of window `row` is the first of a document, as `OpenShard.cuts` gives them.
            positions: [n], of the windows in the run.

        Returns:
            `row` and `cut`, with the places where the rest of a piece follows the end of its rearranged part.
        """
        new: list[tuple[int, int]] = []
        for i, position in enumerate(positions.tolist()):
            bounds = [0, *np.unique(cut[row == i]).tolist(), text.shape[1]]
            new += [(i, at) for at in self._window(text[i], bounds, position)]
        rows, cuts = np.array(new, np.int64).reshape(-1, 2).T
        return np.append(row, rows), np.append(cut, cuts)

    def _window(self, window: np.ndarray, bounds: Sequence[int], position: int) -> list[int]:
        """Rearrange the pieces between the bounds; returns the places where one goes on behind an end."""
        rests = []
        draws = _fractions(4 * (len(bounds) - 1), self.seed, _WINDOWS, position).reshape(-1, 4).tolist()
        for (chosen, length, *cuts), (start, stop) in zip(draws, pairwise(bounds), strict=True):
            size = stop - start
            if chosen >= self.rate or size < LEAST:
                continue
            kept = size - _MARKS  # ids of the piece that there is room for
            whole = window[stop - 1] == self.end
            text = kept if whole else _MARKS + int(length * (kept - _MARKS + 1))
            piece = window[start : start + kept].copy()
            window[start : start + text + _MARKS] = self.arranged(piece[:text], *cuts)
            window[start + text + _MARKS : stop] = piece[text:]
            if text < kept:
                rests.append(start + text + _MARKS)
        return rests

    def arranged(self, text: np.ndarray, one: float, other: float) -> np.ndarray:
        """The ids of a text, cut at two fractions of it, with the three tokens and the end: four more."""
        first, last = sorted(int(at * (len(text) + 1)) for at in (one, other))
        parts = ([self.prefix], text[:first], [self.suffix], text[last:], [self.middle], text[first:last], [self.end])
        return np.concatenate([np.asarray(part, text.dtype) for part in parts])

    def example(self, number: int) -> tuple[float, float] | None:
        """The two cuts of an example by its number among those to train on; None if it stays as it is."""
        chosen, *cuts = _fractions(3, self.seed, _EXAMPLES, number).tolist()
        return (cuts[0], cuts[1]) if chosen < self.rate else None


def _fractions(n: int, *key: int) -> np.ndarray:
    """n numbers in [0, 1), [n] float64: the upper 53 bits of each output, so that every machine has the same."""
    return (outputs(n, *key) >> np.uint64(11)) * 2.0**-53

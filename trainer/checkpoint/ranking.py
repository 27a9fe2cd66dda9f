"""The ranking of a run's checkpoints by validation loss, among those whose losses measure the same, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Ranking:
    """The lowest validation loss since what it measures last changed. The same on all ranks."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """`state`: a checkpoint's, {} for a new run. One of an older version does not say what it measured."""
        self._best: float | None = state.get("best_val_loss")
        self._measured: str | None = state.get("measured")

    def enter(self, measured: str) -> str | None:
        """Take up what is measured from now on; returns a line if the ranking starts anew, as it is something else."""
        before, self._measured = self._measured, measured
        lost, self._best = self._best, self._best if before in (None, measured) else None
        if lost == self._best:
            return None
        return (
            f"val loss is now of {measured}, and was of {before}: the ranking of checkpoints starts anew, and the best "
            f"so far, val loss {lost:.4f}, is no longer kept for it"
        )

    def beats(self, loss: float) -> bool:
        """True if a loss is lower than all before."""
        return math.isfinite(loss) and (self._best is None or loss < self._best)

    def take(self, loss: float) -> None:
        """The checkpoint of this loss is saved."""
        self._best = loss if self.beats(loss) else self._best

    def state(self) -> dict[str, Any]:
        """The part of state.json from which the next start goes on."""
        return {"best_val_loss": self._best, "measured": self._measured}


def best(checkpoints: Iterable[tuple[T, Mapping[str, Any]]]) -> T | None:
    """The one of the lowest finite `val_loss`, of those whose `measured` has not changed since.

    `checkpoints`: each with its state, the newest last. One without `measured` is of an older version, and counts.
    """
    losses: list[tuple[T, float]] = []
    measured = None
    for checkpoint, state in checkpoints:
        loss, ours = state.get("val_loss"), state.get("measured")
        if not isinstance(loss, float) or not math.isfinite(loss):
            continue
        if ours is not None and measured is not None and ours != measured:
            losses = []
        measured = ours or measured
        losses.append((checkpoint, loss))
    return min(losses, key=lambda each: each[1])[0] if losses else None

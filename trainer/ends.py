"""The ends to which a run comes by itself before max_steps: its hours are over, or validation finds nothing better."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any


class Ends:
    """Looks for the end of a run. The same on all ranks, but for the clock: rank 0's vote tells of that."""

    def __init__(self, max_hours: float | None, patience: int, trained_s: float) -> None:
        """`patience`: validations in a row without a new lowest loss, 0 for any number; `trained_s`: by all earlier
        starts, the same on all ranks."""
        self._limit_s = math.inf if max_hours is None else 3600 * max_hours
        self._patience = patience
        self._trained_s = trained_s
        self._since: float | None = None  # time.monotonic of the first `resume`
        self.why: str | None = None  # the reason to end after the last step, in words

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, {} for the beginning; a run that is over stays so."""
        kept = state.get("patience", {})
        self._best: float | None = kept.get("best")
        self._waited: int = kept.get("waited", 0)
        self._measured: str | None = kept.get("measured")
        self.why = None
        self._since = self._since or time.monotonic()
        self._out_of_patience()
        self.out_of_time(self._trained_s >= self._limit_s)

    def state(self) -> dict[str, Any]:
        """The part of state.json from which the next start goes on."""
        return {"patience": {"best": self._best, "waited": self._waited, "measured": self._measured}}

    def time_is_up(self) -> bool:
        """True once the starts have trained for max_hours together, by this rank's clock."""
        return self._seconds() >= self._limit_s

    def out_of_time(self, agreed: bool) -> bool:
        """End the run if the ranks have agreed that the time is up; returns `agreed`."""
        if agreed:
            self.why = (
                f"max_hours={self._limit_s / 3600:g}: {self._seconds() / 3600:.3g} hours of training in all its starts"
                "; a larger max_hours goes on"
            )
        return agreed

    def validated(self, loss: float, measured: str) -> None:
        """Take a validation into account, of equal bits on all ranks; what it measures begins the count anew."""
        if measured != self._measured:
            self._best, self._waited, self._measured = None, 0, measured
        if math.isfinite(loss) and (self._best is None or loss < self._best):
            self._best, self._waited = loss, 0
        else:
            self._waited += 1
        self._out_of_patience()

    def _seconds(self) -> float:
        return self._trained_s + time.monotonic() - (self._since or time.monotonic())

    def _out_of_patience(self) -> None:
        if 0 < self._patience <= self._waited:
            best = "finite" if self._best is None else f"below {self._best:.4f}"
            self.why = (
                f"eval.patience={self._patience}: val loss has not been {best} for {self._waited} validations; "
                "a larger eval.patience goes on"
            )

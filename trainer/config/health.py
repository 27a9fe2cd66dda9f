"""Settings for a run that fails by itself: ranks that make no progress, losses that are not numbers.

Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import UserError


@dataclass
class WatchConfig:
    """The time limits after which a run counts as hung, and those of ranks that wait for one another.

    The watchdog must fire before collectives time out, since only it knows which rank is late: collective_s is above
    hang_min_s, start_s and stop_s.
    """

    beat_s: float = 5.0  # between two heartbeats of a rank
    hang_factor: float = 10.0  # a step that takes so many times the median of the last ones is hung
    hang_min_s: float = 120.0  # and at least so long; with a remote source, what data.fetch may take comes on top
    start_s: float = 600.0  # what a first step (compilation), a batch of validation, a silent checkpoint may take
    stop_s: float = 60.0  # after a signal: for the ranks to agree, else they exit; and to end a feed's iteration
    collective_s: float = 900.0  # a rank that waits longer for the others in a collective ends itself, without stacks

    def __post_init__(self) -> None:
        for key in ("beat_s", "hang_factor", "hang_min_s", "start_s", "stop_s", "collective_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"watch.{key}={getattr(self, key)}: give a positive number")

    def contradictions(self, fetch_s: float) -> list[str]:
        """Limits that the collectives' timeout would precede. `fetch_s`: the limit of a remote source, or 0."""
        limits = {
            f"watch.hang_min_s={self.hang_min_s:g}{f' and {fetch_s:g} of data.fetch' * (fetch_s > 0)}": (
                self.hang_min_s + fetch_s
            ),
            f"watch.start_s={self.start_s:g}": self.start_s,
            f"watch.stop_s={self.stop_s:g}": self.stop_s,
        }
        return [
            f"{name} is not below watch.collective_s={self.collective_s:g}: what hangs ends by the collectives' "
            "timeout, without stacks"
            for name, seconds in limits.items()
            if seconds >= self.collective_s
        ]


@dataclass
class GuardConfig:
    """The conditions for skipping the update of a step, and for rolling back to a checkpoint."""

    spike_z: float = 12.0  # robust z-score of loss or log gradient norm above which a step is skipped; 0 = never
    window: int = 128  # accepted steps that the score is reckoned over
    min_steps: int = 32  # of them, before a spike can be told
    skips: int = 3  # bad steps among the last `within` before the run goes back to a checkpoint
    within: int = 32  # steps in which `skips` are counted
    max_rollbacks: int = 3  # in a run; after that it stops with the report
    recheck_every: int = 0  # steps between two that are computed twice and compared; 0 = never

    def __post_init__(self) -> None:
        if not 0 <= self.spike_z < math.inf:
            raise UserError(f"guard.spike_z={self.spike_z}: give a positive number, or 0 for no spikes")
        if not 2 <= self.min_steps <= self.window or not 1 <= self.skips <= self.within:
            raise UserError(
                f"guard: min_steps={self.min_steps} and window={self.window}, skips={self.skips} and "
                f"within={self.within}: give 2 <= min_steps <= window and 1 <= skips <= within"
            )
        if self.max_rollbacks < 0 or self.recheck_every < 0:
            raise UserError(
                f"guard.max_rollbacks={self.max_rollbacks}, guard.recheck_every={self.recheck_every}: give 0 or more"
            )

"""Settings of checkpoints: when they are written, and which are kept. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import MISSING, UserError


@dataclass
class CheckpointConfig:
    every_steps: int = MISSING  # 0 = only at the end
    every_minutes: float = 0.0  # 0 = by steps alone; otherwise whichever comes first
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # and the one with the lowest validation loss, of those that measure the same
    background: bool = True  # train on while it is written, from a host copy: 12 bytes x parameters / world_size a rank

    def __post_init__(self) -> None:
        if self.every_steps < 0 or not 0 <= self.every_minutes < math.inf or self.keep < 1:
            raise UserError(
                f"checkpoint: every_steps={self.every_steps} and every_minutes={self.every_minutes} must be 0 or more "
                f"and finite, keep={self.keep} at least 1"
            )

    def due(self, age_s: float) -> bool:
        """True if the clock asks for a checkpoint so long after the last one."""
        return 0 < self.every_minutes * 60 <= age_s

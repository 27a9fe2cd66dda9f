"""What a user may say about starting runs, and what is refused before one starts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.config import MISSING, UserError


@dataclass
class SupervisedRunConfig:
    dir: str = MISSING  # the run.dir that the command trains in: its checkpoints are the progress that counts


@dataclass
class SuperviseConfig:
    """`python -m launch.supervise ... -- COMMAND`: start the command again when it fails."""

    run: SupervisedRunConfig = MISSING
    max_restarts: int = 3  # in a row without a new checkpoint
    backoff_s: float = 1.0  # before the first restart; doubles with each that brought no new checkpoint
    max_backoff_s: float = 60.0
    grace_s: float = 30.0  # between SIGTERM and SIGKILL for processes that a failed start left behind

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise UserError(f"max_restarts={self.max_restarts}: give 0 (never restart) or more")
        if not 0 <= self.backoff_s <= self.max_backoff_s or not self.grace_s >= 0:
            raise UserError(
                f"backoff_s={self.backoff_s}, max_backoff_s={self.max_backoff_s}, grace_s={self.grace_s}: "
                "give 0 <= backoff_s <= max_backoff_s and 0 <= grace_s"
            )

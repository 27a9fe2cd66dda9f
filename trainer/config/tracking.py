"""Where the numbers of a run go. Standard library only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

from conf.errors import MISSING, UserError


class Tracker(Enum):
    mlflow = "mlflow"
    none = "none"  # metrics.jsonl in the run folder only


@dataclass
class TrackingConfig:
    name: Tracker = MISSING
    uri: str | None = None  # mlflow: where the server or the database is
    experiment: str = "gradus"
    system_s: float = 10.0  # between two looks at the CPU, memory, disk, network and GPUs of rank 0's node; 0 = none
    register: str | None = None  # mlflow: the finished run's last checkpoint becomes a version of this model

    def __post_init__(self) -> None:
        if not 0 <= self.system_s < math.inf:
            raise UserError(f"tracking.system_s={self.system_s}: give seconds, or 0 for no system metrics")
        if self.register is not None and self.name is Tracker.none:
            raise UserError(f"tracking.register={self.register} needs MLflow's registry: give tracking=mlflow, or null")
        if self.register is not None and not re.fullmatch(r"[\w.-]+( [\w.-]+)*", self.register):
            raise UserError(f"tracking.register={self.register!r}: give a name of letters, digits, '.', '_' and '-'")


@dataclass
class SyncConfig:
    """`python -m trainer.tracking sync`: what a run's journal holds and MLflow has not."""

    run_dir: str = MISSING  # of a run that is over or stands still, also a copy of one
    uri: str | None = None  # another server or database than the run's own
    timeout_s: float = 60.0  # a server that takes nothing for so long ends it, exit code 1

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise UserError(f"timeout_s={self.timeout_s}: give a positive number of seconds")

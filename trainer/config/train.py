"""The settings that every kind of training has. Standard library only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum

from conf.errors import MISSING, UserError
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.health import GuardConfig, WatchConfig
from trainer.config.model import ModelConfig
from trainer.config.optim import OptimConfig
from trainer.config.parallel import AUTO, Compile, IntOrAuto, ParallelConfig, Precision
from trainer.config.tracking import TrackingConfig


class Resume(Enum):
    auto = "auto"  # from the run's last checkpoint where there is one, else from the start
    never = "never"  # refuses a run folder that already holds a checkpoint
    must = "must"  # refuses a run folder that holds none


@dataclass
class RunConfig:
    name: str = MISSING  # of the run, as trackers show it
    dir: str = MISSING  # checkpoints, metrics, the frozen config: all that a restart needs

    def __post_init__(self) -> None:
        check_run(self.name, self.dir)


def check_run(name: str, run_dir: str) -> None:
    """Raises UserError for a run.name or run.dir that is no name of a folder: by default `name` is one in runs/."""
    for key, value in (("name", name), ("dir", run_dir)):
        if not value.strip():
            raise UserError(f"run.{key} is empty: give one")
        if "\0" in value:
            raise UserError(f"run.{key} holds a zero byte, which no path can: give another")
    if name.startswith("/") or {".", ".."} & set(name.split("/")):
        raise UserError(
            f"run.name={name!r} names a folder in runs/: give one without / in front and without . or .. as a part of "
            "it, such as small_1; run.dir may be any folder"
        )


@dataclass
class TrainConfig:
    """A run of any kind: the trainer, the engine and the checkpoints read no more than this."""

    run: RunConfig = MISSING
    model: ModelConfig = MISSING
    optim: OptimConfig = MISSING
    parallel: ParallelConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    tracking: TrackingConfig = MISSING
    micro_batch_size: IntOrAuto = MISSING  # sequences per rank per micro step, or auto; grad_accum_steps is derived
    max_steps: int = MISSING  # of the whole run: a resumed one goes on to here
    max_hours: float | None = None  # of training, over all starts, after which the run ends itself; null = any number
    precision: Precision = MISSING
    compile: Compile = Compile.auto  # torch.compile of the blocks and the loss
    init_from: str | None = None  # a checkpoint or run folder of the same model: its weights are where a new run starts
    guard: GuardConfig = field(default_factory=GuardConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    seed: int = 1337  # of the weights, the data's order and dropout
    deterministic: bool = False  # GPU: bit-exact resume, at some cost of speed; CPU is always exact
    resume: Resume = Resume.auto
    resume_step: int | None = None  # go back to the run's checkpoint of this step; null = the latest one
    take_over: int | None = None  # the number of a start that goes on in run.dir, to take the run over from it
    log_every: int = 1  # steps
    profile: str | None = None  # steps such as 10-12, of which torch.profiler writes a trace of rank 0; null = none
    gpu: str | None = None  # what `auto` reckons with, as launch.plan names it; null = what nvidia-smi says

    def __post_init__(self) -> None:
        if isinstance(self.micro_batch_size, str) and self.micro_batch_size != AUTO:
            raise UserError(f"micro_batch_size={self.micro_batch_size}: give an integer, or auto")
        if self.max_hours is not None and not 0 < self.max_hours < math.inf:
            raise UserError(f"max_hours={self.max_hours}: give a positive number, or null for no limit")
        at_least_one(self, "micro_batch_size", "log_every")
        if self.resume_step is not None:
            at_least_one(self, "resume_step")
        self.check_steps()

    def check_steps(self) -> None:
        """Raises UserError for a number of steps, or a range of them, that no run has."""
        at_least_one(self, "max_steps")
        profiled_steps(self.profile, self.max_steps)


def profiled_steps(profile: str | None, max_steps: int) -> tuple[int, int] | None:
    """The first and the last step of `profile`; None without. Raises UserError for no range of the run's steps."""
    if profile is None:
        return None
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", profile, re.ASCII)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last <= max_steps:
        raise UserError(f"profile={profile}: give the first and the last step, of 1 to max_steps={max_steps}: 10-12")
    return first, last


def at_least_one(cfg: object, *keys: str) -> None:
    """Raises UserError naming the first key whose number is below 1."""
    for key in keys:
        if getattr(cfg, key) != AUTO and getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: give at least 1")

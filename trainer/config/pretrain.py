"""What a user may say about a run, and what is refused before a GPU is taken. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from conf.errors import MISSING, UserError
from data_pipeline.config import DataConfig, RampConfig
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
    name: str = MISSING
    dir: str = MISSING  # checkpoints, metrics, the frozen config: all that a restart needs


@dataclass
class EvalConfig:
    every: int = MISSING  # steps; 0 = only at the end
    windows: int | None = None  # validation windows used, from the first on; null = all

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"eval.every={self.every}: give a number of steps, or 0 to validate only at the end")
        if self.windows is not None and self.windows < 1:
            raise UserError(f"eval.windows={self.windows}: give at least 1, or null for all")


@dataclass
class PretrainConfig:
    """`python -m trainer.pretrain`: a language model from shards."""

    run: RunConfig = MISSING
    model: ModelConfig = MISSING
    optim: OptimConfig = MISSING
    data: DataConfig = MISSING
    parallel: ParallelConfig = MISSING
    eval: EvalConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    tracking: TrackingConfig = MISSING
    tokens_per_step: int = MISSING  # tokens in one optimizer update, over all ranks
    micro_batch_size: IntOrAuto = MISSING  # sequences per rank per micro step, or auto; grad_accum_steps is derived
    max_steps: int = MISSING
    precision: Precision = MISSING
    compile: Compile = Compile.auto  # torch.compile of the blocks and the loss
    init_from: str | None = None  # a checkpoint or run folder of the same model: its weights are where a new run starts
    batch_ramp: RampConfig = field(default_factory=RampConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    seed: int = 1337  # of the weights, the data's order and dropout
    deterministic: bool = False  # GPU: bit-exact resume, at some cost of speed; CPU is always exact
    resume: Resume = Resume.auto
    log_every: int = 1  # steps
    gpu: str | None = None  # what `auto` reckons with, as launch.plan names it; null = what nvidia-smi says

    def __post_init__(self) -> None:
        if isinstance(self.micro_batch_size, str) and self.micro_batch_size != AUTO:
            raise UserError(f"micro_batch_size={self.micro_batch_size}: give an integer, or auto")
        for key in ("tokens_per_step", "micro_batch_size", "max_steps", "log_every"):
            if getattr(self, key) != AUTO and getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: give at least 1")

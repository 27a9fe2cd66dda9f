"""The settings of pre-training, checked before a GPU is taken. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.errors import MISSING, UserError
from data_pipeline.config import DataConfig, RampConfig
from trainer.config.train import TrainConfig, at_least_one


@dataclass
class SamplesConfig:
    """Texts that the model continues at each validation."""

    prompts: list[str] = field(default_factory=list)  # "" = a text from its start; [] = no samples
    tokens: int = 64  # new ones of each text at most; with the prompt within model.n_ctx
    seed: int = 0  # of the draws, the same at each validation

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"eval.samples.tokens={self.tokens}: give at least 1, or eval.samples.prompts=[]")


@dataclass
class EvalConfig:
    every: int = MISSING  # steps; 0 = only at the end, and not at all if no source has validation data
    windows: int | None = None  # validation windows used, from the first on; null = all
    patience: int = 0  # validations in a row without a new lowest loss after which the run ends; 0 = any number
    train_windows: int = 0  # training windows of each source, from the first on, whose loss shows overfitting; 0 = none
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    tasks: list[str] = field(default_factory=list)  # of conf/task/, or YAML files of yours; [] = none
    tasks_every: int = 0  # steps between two times that the model is scored on them; 0 = only at the end
    tasks_limit: int | None = None  # the first questions of each task alone; null = all
    task_data: str | None = None  # the folder that holds the tasks' files

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"eval.every={self.every}: give a number of steps, or 0 to validate only at the end")
        if self.windows is not None and self.windows < 1:
            raise UserError(f"eval.windows={self.windows}: give at least 1, or null for all")
        if self.patience < 0:
            raise UserError(f"eval.patience={self.patience}: give a number of validations, or 0 to train to max_steps")
        if self.patience and not self.every:
            raise UserError(
                f"eval.patience={self.patience} with eval.every=0, which validates only at the end: give eval.every=N, "
                "or eval.patience=0"
            )
        if self.train_windows < 0:
            raise UserError(f"eval.train_windows={self.train_windows}: give a number of windows, or 0 for none")
        self._check_tasks()

    def _check_tasks(self) -> None:
        if self.tasks_every < 0:
            raise UserError(f"eval.tasks_every={self.tasks_every}: give a number of steps, or 0 for only at the end")
        if self.tasks_limit is not None and self.tasks_limit < 1:
            raise UserError(f"eval.tasks_limit={self.tasks_limit}: give at least 1, or null for all questions")
        twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"eval.tasks={self.tasks}: {twice} is there twice: give it once")
        unset = {"tasks_every": 0, "tasks_limit": None, "task_data": None}
        idle = next((key for key, value in unset.items() if getattr(self, key) != value), None)
        if idle is not None and not self.tasks:
            raise UserError(
                f"eval.{idle}={getattr(self, idle)} with eval.tasks=[] scores nothing: give tasks, such as "
                f"eval.tasks=[lambada], or leave eval.{idle} out"
            )


@dataclass
class PretrainConfig(TrainConfig):
    """`python -m trainer.pretrain`: a language model from shards."""

    data: DataConfig = MISSING
    eval: EvalConfig = MISSING
    tokens_per_step: int = MISSING  # tokens in one optimizer update, over all ranks
    batch_ramp: RampConfig = field(default_factory=RampConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "tokens_per_step")

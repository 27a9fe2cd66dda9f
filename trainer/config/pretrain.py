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

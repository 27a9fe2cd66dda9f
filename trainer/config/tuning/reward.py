"""The settings of a reward model. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING
from data_pipeline.examples.examples_config import ExamplesConfig
from trainer.config.tuning.common import TuneConfig, refuse_compile


@dataclass
class RewardConfig(TuneConfig):
    """`python -m trainer.reward`: a reward model, trained on comparisons of answers."""

    examples: ExamplesConfig = MISSING
    demonstrations: str | None = None  # files of conversations that are to score 0; null = the best answers trained on

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_compile(self.compile)

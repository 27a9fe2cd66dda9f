"""The settings of supervised fine-tuning. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING
from data_pipeline.config import check_fim_rate
from data_pipeline.examples.examples_config import ExamplesConfig
from trainer.config.tuning.common import TuneConfig


@dataclass
class SftConfig(TuneConfig):
    """`python -m trainer.sft`: supervised fine-tuning on conversations, or on prompts and their completions."""

    examples: ExamplesConfig = MISSING
    fim_rate: float = 0.0  # share of the completions (template text) whose middle alone is learnt, after both its sides

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fim_rate("fim_rate", self.fim_rate)

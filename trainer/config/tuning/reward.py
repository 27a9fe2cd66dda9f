"""The settings of a reward model. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING, UserError
from data_pipeline.examples.examples_config import ExamplesConfig
from trainer.config.parallel import Compile
from trainer.config.tuning.common import TuneConfig


@dataclass
class RewardConfig(TuneConfig):
    """`python -m trainer.reward`: a reward model, trained on comparisons of answers."""

    examples: ExamplesConfig = MISSING
    demonstrations: str | None = None  # files of conversations that are to score 0; null = the best answers trained on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile is not Compile.off:
            raise UserError(
                f"compile={self.compile.value}: each number of answers and each length would be compiled anew, and too "
                "many end the run: give compile=off"
            )

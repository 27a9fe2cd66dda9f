"""The settings of direct preference optimisation. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import MISSING, UserError
from data_pipeline.examples.examples_config import ExamplesConfig
from trainer.config.tuning.common import TuneConfig, refuse_compile


@dataclass
class DpoConfig(TuneConfig):
    """`python -m trainer.dpo`: direct preference optimisation on comparisons. `init_from` is the reference too."""

    examples: ExamplesConfig = MISSING
    beta: float = 0.1  # how hard the model is held to the reference: a higher one leaves it nearer

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_compile(self.compile)
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta={self.beta}: give a positive number, such as 0.1")

"""The settings of GPT-1's fine-tuning on labelled examples. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import MISSING, UserError
from data_pipeline.examples.examples_config import LabelledConfig
from trainer.config.optim import Kind
from trainer.config.tuning.common import TuneConfig, refuse_compile


@dataclass
class FinetuneConfig(TuneConfig):
    """`python -m trainer.finetune`: GPT-1's fine-tuning with a head, on labelled examples of one task."""

    examples: LabelledConfig = MISSING
    lm_weight: float = 0.5  # lambda, the weight of the language model's loss beside the task's; 0 = not computed
    freeze: int = 0  # first blocks that keep their weights; embeddings are trained, for the task's tokens are new
    head_dropout: float = 0.1  # on the states that the head reads; one mask for all sequences of an example
    warmup_share: float = 0.0  # of the run's steps, as its linear warm-up; read where optim.schedule.warmup is 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_compile(self.compile)
        if not 0 <= self.lm_weight < math.inf:
            raise UserError(f"lm_weight={self.lm_weight}: give a weight that is finite and not negative")
        if not 0 <= self.freeze <= self.model.n_layer:
            raise UserError(f"freeze={self.freeze}: give 0 to the {self.model.n_layer} blocks of model.n_layer")
        if self.freeze and self.optim.kind is not Kind.adamw:
            raise UserError(f"freeze={self.freeze} with optim.kind={self.optim.kind.value}: give adamw, or freeze=0")
        if not 0 <= self.head_dropout < 1:
            raise UserError(f"head_dropout={self.head_dropout}: give a share below 1, or 0 for none")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share={self.warmup_share}: give a share of the steps below 1, or 0 for none")

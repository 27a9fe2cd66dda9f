"""The settings of supervised fine-tuning. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING
from data_pipeline.examples.examples_config import ExamplesConfig
from trainer.config.tuning.common import TuneConfig


@dataclass
class SftConfig(TuneConfig):
    """`python -m trainer.sft`: supervised fine-tuning on conversations, or on prompts and their completions."""

    examples: ExamplesConfig = MISSING

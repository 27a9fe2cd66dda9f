"""Settings of the command that samples answers to be ranked. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import MISSING, UserError
from data_pipeline.examples.examples_config import ExamplesConfig
from trainer.config.inference import Number


@dataclass
class SampleAnswersConfig:
    """`python -m trainer.tuning.sample_answers`: several answers of a checkpoint to each prompt, to be ranked."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    examples: ExamplesConfig = MISSING
    output: str = MISSING  # the JSON lines to write: a prompt and its responses each
    n: int = 4  # answers to each prompt; InstructGPT's 4 to 9
    max_new_tokens: int = 256  # of an answer, its end token included; less where n_ctx leaves less
    temperature: float = 1.0  # above 0: greedy answers are alike
    top_k: int | None = None  # draw from the k likeliest tokens; null = from all
    top_p: float | None = None  # draw from the likeliest tokens that hold this share; null = from all
    seed: int = 0  # of the draws
    batch_size: int = 16  # answers computed at a time on each data-parallel rank
    tp: int = 1  # ranks that share one copy of the model; the others have copies of their own
    precision: Number = Number.fp32  # bf16 takes half the memory, and has three digits

    def __post_init__(self) -> None:
        for key in ("n", "max_new_tokens", "batch_size", "tp"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: give at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: give more than 0: greedy answers are alike")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: give at least 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give 0 < top_p <= 1, or null")

"""Settings of `python -m trainer.generate`. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import MISSING, UserError


@dataclass
class GenerateConfig:
    """`python -m trainer.generate`: continue prompts with a checkpoint of any layout."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    prompt: str | None = None
    prompt_file: str | None = None  # one prompt a line; "-" = standard input
    prompt_ids: list[list[int]] | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        given = [k for k in ("prompt", "prompt_file", "prompt_ids") if getattr(self, k) is not None]
        if len(given) != 1:
            raise UserError(
                f"give exactly one of prompt, prompt_file and prompt_ids; given: {', '.join(given) or 'none'}"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: give at least 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give 0 < top_p <= 1, or null")

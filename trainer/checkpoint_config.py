"""When checkpoints are written, and what is done with one. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.config import MISSING, UserError


@dataclass
class CheckpointConfig:
    every_steps: int = MISSING  # 0 = only at the end
    every_minutes: float = 0.0  # 0 = by steps alone; otherwise whichever comes first
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # and the one with the lowest validation loss
    background: bool = (
        True  # train on while it is written, from a host copy: about 12 bytes x parameters / world_size a rank
    )

    def __post_init__(self) -> None:
        if self.every_steps < 0 or not 0 <= self.every_minutes < math.inf or self.keep < 1:
            raise UserError(
                f"checkpoint: every_steps={self.every_steps} and every_minutes={self.every_minutes} must be 0 or more "
                f"and finite, keep={self.keep} at least 1"
            )


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


@dataclass
class ImportHfConfig:
    """`python -m trainer.import_hf`: a folder of Hugging Face's GPT-2 or OpenAI GPT to a checkpoint."""

    source: str = MISSING  # holds config.json, model.safetensors (or its parts and their index), perhaps tokenizer.json
    out: str = MISSING  # the checkpoint's folder, which is not there yet


@dataclass
class ExportHfConfig:
    """`python -m trainer.export_hf`: a checkpoint to a folder that transformers opens."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    out: str = MISSING  # a folder which is not there yet
    compare: bool = True  # with transformers' model, opened from the written folder; false needs no transformers

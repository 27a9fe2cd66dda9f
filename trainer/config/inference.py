"""Settings of the commands that ask a model: `trainer.generate` and `trainer.evaluate`. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from conf.errors import MISSING, UserError


@dataclass
class GenerateConfig:
    """`python -m trainer.generate`: continue prompts with a checkpoint of any layout."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    prompt: str | None = None  # empty, as an empty line or list: a text from its start, after the end-of-text token
    prompt_file: str | None = None  # one prompt a line; "-" = standard input
    prompt_ids: list[list[int]] | None = None  # token ids instead of a prompt, a list for each
    suffix: str | None = None  # print what stands between prompt and this text, of a model trained with a fim_rate
    special_tokens: bool = False  # true: <|endoftext|> and the like in a prompt are the tokens, not their letters
    num_samples: int = 1  # of each prompt, one after the other
    max_new_tokens: int = 64  # beyond the model's n_ctx by a sliding window, which a note says
    slide: int = 1  # tokens that the window moves by: 1 lets each token see n_ctx others, n_ctx / 2 is far faster
    stop: list[str] = field(default_factory=list)  # texts before which a sample ends
    stream: bool = False  # print a sample while it is made, and the samples one after the other
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None  # draw from the k likeliest tokens; null = from all
    top_p: float | None = None  # draw from the likeliest tokens that hold this share; null = from all
    seed: int = 0  # of the draws
    json: bool = False  # print a JSON object for each sample

    def __post_init__(self) -> None:
        given = [k for k in ("prompt", "prompt_file", "prompt_ids") if getattr(self, k) is not None]
        if len(given) != 1:
            raise UserError(
                f"give exactly one of prompt, prompt_file and prompt_ids; given: {', '.join(given) or 'none'}; "
                "prompt='' samples from the start of a text"
            )
        if self.suffix is not None and self.prompt is None:
            raise UserError(f"suffix={self.suffix} stands behind the text of prompt: give prompt=TEXT, '' for none")
        if self.num_samples < 1:
            raise UserError(f"num_samples={self.num_samples}: give at least 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"num_samples={self.num_samples} with temperature=0 is one text {self.num_samples} times: give "
                "num_samples=1, or temperature=1"
            )
        if self.slide < 1:
            raise UserError(f"slide={self.slide}: give at least 1")
        if "" in self.stop:
            raise UserError(f"stop={self.stop} holds an empty text, before which every sample ends: leave it out")
        if self.stream and self.json:
            raise UserError("stream=true prints text, json=true one object when all is done: give one of them")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: give at least 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give 0 < top_p <= 1, or null")


class Number(Enum):
    """The numbers that a model computes with."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class EvaluateConfig:
    """`python -m trainer.evaluate`: score a checkpoint of any layout on tasks."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    tasks: list[str] = MISSING  # of conf/task/, YAML files of yours, or names of lm-evaluation-harness
    task_data: str | None = None  # the folder that holds the tasks' files
    against: list[str] = field(default_factory=list)  # training shards: figures of clean and dirty questions too
    shots: int | None = None  # demonstrations before each question; null = as many as the task says
    limit: int | None = None  # the first documents of each task alone; null = all
    max_new_tokens: int | None = None  # of a text that a task has the model write; null = as many as the task says
    seed: int = 0  # of the choice of demonstrations, and of drawn texts
    batch_size: int = 16  # texts computed at a time on each data-parallel rank
    tp: int = 1  # ranks that share one copy of the model; the others have copies of their own
    precision: Number = Number.fp32  # bf16 takes half the memory, and has three digits
    tokenizer: str | None = None  # where the checkpoint has none: gpt2, a tokenizer.json, or a folder with one
    output: str | None = None  # the folder of reports; null = evaluations/ in the run folder, or beside the checkpoint
    json: bool = False  # print one line of JSON instead of the table

    def __post_init__(self) -> None:
        for key, least in (("shots", 0), ("limit", 1), ("max_new_tokens", 1), ("batch_size", 1), ("tp", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"{key}={value}: give at least {least}")
        if isinstance(self.tasks, list):
            if not self.tasks:
                raise UserError("tasks=[] is empty: give at least one, such as tasks=[lambada]")
            twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"tasks={self.tasks}: {twice} is there twice: give it once")

"""Entry: `python -m trainer.sft`: supervised fine-tuning on conversations, alone or under torchrun, deepspeed or Slurm.

The loss is that of the answers and their end tokens, divided by the number of these tokens in the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from conf.errors import UserError
from conf.schema import run
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.examples_config import Template
from data_pipeline.examples.read import read_examples
from data_pipeline.examples.rows import pack
from data_pipeline.examples.templates import Example, Renderer
from data_pipeline.stream.infill import Infill
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import INFILL
from trainer.config.tuning.sft import SftConfig
from trainer.distributed.world import read_world
from trainer.run.signals import OF_THIS_PROCESS
from trainer.run_task import run_task
from trainer.tuning.check import Checked, Reader, check

if TYPE_CHECKING:
    from trainer.task import Task


def sft(cfg: SftConfig) -> None:
    """Tune a language model on the answers of conversations."""
    world = read_world()

    def read(path: str, tokenizer: Tokenizer, n_ctx: int) -> Examples[Example, Renderer]:
        found = read_examples(replace(cfg.examples, path=path), tokenizer, n_ctx, INFILL if cfg.fim_rate else ())
        if cfg.fim_rate and found.renderer.template is not Template.text:
            raise UserError(
                f"fim_rate={cfg.fim_rate} takes the middles out of completions, but {path} has the {found.about}: give "
                "records of a prompt and a completion with examples.template=text, or fim_rate=0"
            )
        return found

    def arrange(examples: Sequence[Example], renderer: Renderer) -> list[Example]:
        infill = Infill.of(cfg.fim_rate, cfg.seed, renderer.special)
        return [infilled(example, infill, number) for number, example in enumerate(examples)]

    reader = Reader(
        read, all_ids, row_length, side=lambda example: example.ids, arrange=arrange if cfg.fim_rate else None
    )
    checked = check(cfg, world, cfg.examples.path, reader)
    run_task(checked.cfg, world, checked.workload, lambda: answers(checked), checked.lines)


def all_ids(example: Example) -> np.ndarray:
    """The ids of an example, and its mask."""
    return np.append(example.ids, example.mask)


def infilled(example: Example, infill: Infill, number: int) -> Example:
    """The example of this number, or its completion cut in three: only the middle and its end are labels then.

    The prompt stands before the completion's first part: three ids more than before.
    """
    cuts = infill.example(number)
    if cuts is None or infill.middle in example.ids:  # that is one already
        return example
    start = int(np.argmax(example.mask))  # of the completion
    mark, *rest = np.split(infill.arranged(example.ids[start:-1], *cuts), [1])
    ids = np.concatenate([example.ids[:1], mark, example.ids[1:start], *rest])
    return Example(ids, np.cumsum(ids == infill.middle) - (ids == infill.middle) > 0)


def row_length(example: Example) -> int:
    """The tokens of a row that a conversation takes: its last id is a label alone."""
    return len(example.ids) - 1


def answers(checked: Checked[SftConfig, Example, Renderer]) -> Task:
    """The task of supervised fine-tuning: the language model's loss, over packed conversations."""
    from trainer.data.collate import conversations
    from trainer.objective.language_model import LanguageModel
    from trainer.task import Task
    from trainer.tuning.feed import make_feed

    cfg, n_ctx = checked.cfg, checked.cfg.model.n_ctx
    lengths = list(map(row_length, checked.held_out))
    rows = pack(range(len(lengths)), lengths, n_ctx)
    return Task(
        LanguageModel(),
        make_feed(checked, partial(conversations, n_ctx=n_ctx), "conversations", held_out=rows, fixed=True),
        eval_every=cfg.held_out.every,
        patience=cfg.held_out.patience,
        tokenizer=checked.tokenizer.raw,
        eot_id=checked.renderer.end,
    )


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(SftConfig, sft)

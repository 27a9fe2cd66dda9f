"""Entry: `python -m trainer.reward`: a reward model, alone or under torchrun, deepspeed or Slurm.

It learns from comparisons of answers to say which is better. When it has, its bias is set so that demonstrations score
0 in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from conf.schema import run
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.examples_config import ExamplesConfig
from data_pipeline.examples.pairs import pairs_line
from data_pipeline.examples.read import Preference, read_examples, read_preferences
from data_pipeline.examples.templates import Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.tuning.reward import RewardConfig
from trainer.distributed.world import read_world
from trainer.run.signals import OF_THIS_PROCESS
from trainer.run_task import run_task
from trainer.tuning.check import Checked, Reader, check

if TYPE_CHECKING:
    from trainer.engine.engine import Engine
    from trainer.task import Task

CheckedReward = Checked[RewardConfig, Preference, Renderer]


def reward(cfg: RewardConfig) -> None:
    """Train a trunk and a head of one output on comparisons."""
    world = read_world()

    def read(path: str, tokenizer: Tokenizer, n_ctx: int) -> Examples[Preference, Renderer]:
        return read_preferences(replace(cfg.examples, path=path), tokenizer, n_ctx)

    reader = Reader(read, all_ids, side=lambda item: item.prompt)
    checked = check(cfg, world, cfg.examples.path, reader)
    demonstrations, lines = demonstrated(checked)
    of = (checked.held_out, "held-out") if checked.held_out else (checked.train, "training")
    lines = [*checked.lines, *lines, pairs_line(*of)]
    run_task(checked.cfg, world, checked.workload, lambda: ranking(checked, demonstrations), lines)


def all_ids(item: Preference) -> np.ndarray:
    """The ids of a prompt and its answers, and their ranks."""
    return np.concatenate([item.prompt, *item.answers, item.ranks])


def demonstrated(checked: CheckedReward) -> tuple[Sequence[Preference], list[str]]:
    """The answers that are to score 0 in the mean, compared with nothing, and lines on them.

    Raises:
        UserError: the files of demonstrations cannot be read, or hold none.
    """
    cfg, empty = checked.cfg, np.zeros(0, np.int32)
    if cfg.demonstrations is None:
        return [best(item) for item in checked.train], []
    theirs = ExamplesConfig(path=cfg.demonstrations, template=checked.renderer.template)
    found = read_examples(theirs, checked.tokenizer, cfg.model.n_ctx - 1)  # of n_ctx ids at most: each is an input
    ends = [int(np.flatnonzero(example.mask)[-1]) + 1 for example in found.items]  # behind the last answer's end token
    texts = [example.ids[:end] for example, end in zip(found.items, ends, strict=True)]
    items = [Preference(empty, (text,), np.zeros(1, np.int32)) for text in texts]
    return items, [f"demonstrations: {line}" for line in found.summary()]


def best(item: Preference) -> Preference:
    """The best answers alone."""
    answers = tuple(answer for answer, rank in zip(item.answers, item.ranks, strict=True) if rank == 0)
    return Preference(item.prompt, answers, np.zeros(len(answers), np.int32))


def ranking(checked: CheckedReward, demonstrations: Sequence[Preference]) -> Task:
    """The task of a reward model: the ranking loss of a head's scores, over comparisons."""
    from trainer.data.collate import row_multiple
    from trainer.data.comparisons import comparisons
    from trainer.objective.heads import WithHead
    from trainer.objective.ranking import Ranking
    from trainer.task import Task
    from trainer.tuning.feed import make_feed
    from trainer.tuning.zero_bias import Scored, set_zero_bias

    cfg = checked.cfg
    collate = partial(comparisons, n_ctx=cfg.model.n_ctx, multiple=row_multiple(cfg.parallel.tp))

    def finish(engine: Engine, on_progress: Callable[[], None]) -> Mapping[str, float]:
        some = checked.held_out or checked.train
        shown, answers = (Scored(len(items), collate(items)) for items in (demonstrations, some))
        return set_zero_bias(engine, shown, answers, int(cfg.micro_batch_size), on_progress)

    return Task(
        Ranking(),
        make_feed(checked, collate, "comparisons"),
        model=partial(WithHead, n_out=1, std=1 / math.sqrt(cfg.model.n_embd + 1)),
        eval_every=cfg.held_out.every,
        patience=cfg.held_out.patience,
        tokenizer=checked.tokenizer.raw,
        eot_id=checked.renderer.end,
        finish=finish,
    )


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(RewardConfig, reward)

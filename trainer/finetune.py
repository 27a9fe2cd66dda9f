"""Entry: `python -m trainer.finetune`: GPT-1's fine-tuning on labelled examples, alone or under a launcher.

A head reads the state of the extract token; its loss and, times lm_weight, the language model's are minimised. The
files and their fields are named by `examples.*`; `held_out.path=FILE` or `held_out.fraction=0.1` adds a validation:

    CoLA      examples.path=in_domain_train.tsv examples.columns=[source,label,mark,text] examples.task=classification
              examples.texts=[text] examples.classes=[0,1]
    SST-2     examples.path=train.jsonl examples.task=classification examples.texts=[sentence] examples.classes=[0,1]
    RTE       examples.path=train.jsonl examples.task=classification examples.texts=[sentence_1,sentence_2]
              examples.classes=[not_entailment,entailment]
    SNLI      examples.path=train.tsv examples.task=classification examples.texts=[sentence1,sentence2]
              examples.label=gold_label examples.classes=[entailment,neutral,contradiction]
    STS       examples.path=images.tsv examples.columns=[score,a,b] examples.task=similarity examples.texts=[a,b]
              examples.label=score
    COPA      examples.path=train.jsonl examples.task=choice examples.texts=[premise,question]
              examples.choices=[choice1,choice2]
    Winograd  examples.path=wsc.jsonl examples.task=choice examples.texts=[text] examples.choices=[answers]
              (JSON lines; `answers` lists the candidates, each with the rest of the sentence behind it)
    any TSV   examples.path=mine.tsv examples.columns=[NAME,...] (or its first line names them), then as above

The released code cuts texts that are too long; here such an example is dropped and counted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.schema import run
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.examples_config import Task as Kind
from data_pipeline.examples.labelled import Labelled, TaskRenderer, read_labelled
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.optim import OptimConfig, Unit
from trainer.config.tuning.finetune import FinetuneConfig
from trainer.distributed.world import read_world
from trainer.plan.workload import Workload
from trainer.run.folder import RunFolder
from trainer.run.signals import OF_THIS_PROCESS
from trainer.run_task import run_task
from trainer.tuning.check import Checked, Reader, check

if TYPE_CHECKING:
    from trainer.data.example_feed import ExampleFeed
    from trainer.engine.engine import Engine
    from trainer.task import Task


def finetune(cfg: FinetuneConfig) -> None:
    """Tune a language model, and a head that is new, on the labelled examples of one task."""
    if cfg.held_out.given:
        from trainer.tuning.figures import check_figures

        check_figures(cfg.examples.task)
    world = read_world()

    def read(path: Path | str, tokenizer: Tokenizer, n_ctx: int) -> Examples[Labelled, TaskRenderer]:
        return read_labelled(replace(cfg.examples, path=str(path)), tokenizer, n_ctx)

    checked = check(cfg, world, cfg.examples.path, Reader(read, lambda example: np.concatenate(example.sequences)))
    optim = warmed_up(cfg.optim, cfg.warmup_share, checked.cfg.max_steps)
    checked = replace(checked, cfg=replace(checked.cfg, optim=optim))
    run_task(checked.cfg, world, workload(checked), lambda: labelled_task(checked), checked.lines)


def warmed_up(optim: OptimConfig, share: float, max_steps: int) -> OptimConfig:
    """`optim` with a warm-up over a share of the steps, unless its schedule has one."""
    if optim.schedule.warmup or optim.schedule.unit is not Unit.steps:
        return optim
    return replace(optim, schedule=replace(optim.schedule, warmup=round(share * max_steps)))


def workload(checked: Checked[FinetuneConfig, Labelled, TaskRenderer]) -> Workload:
    """The workload of a step whose rows are as long as the longest example, one for each example: the least."""
    longest = max(len(ids) for example in checked.train for ids in example.sequences)
    model = replace(checked.cfg.model, n_ctx=longest)
    return Workload.of_rows(replace(checked.cfg, model=model), checked.cfg.batch_size)


def labelled_task(checked: Checked[FinetuneConfig, Labelled, TaskRenderer]) -> Task:
    """The task of fine-tuning: a head's loss and the language model's, over labelled examples."""
    from trainer.data.example_feed import ExampleFeed, HeldOut
    from trainer.data.labelled import ROUND, labelled
    from trainer.objective.heads import WithHead
    from trainer.objective.labelled import LabelledTask
    from trainer.task import Task
    from trainer.tuning.scores import HeldOutScores

    cfg, n_ctx, kind = checked.cfg, checked.cfg.model.n_ctx, checked.cfg.examples.task
    multiple = math.lcm(ROUND, int(cfg.parallel.tp or 1))
    objective = LabelledTask(kind, cfg.lm_weight, cfg.head_dropout)
    held_out, scores, size = None, None, int(cfg.micro_batch_size)
    if checked.held_out:
        collate, n = labelled(checked.held_out, n_ctx, multiple), len(checked.held_out)
        held_out = HeldOut([[i] for i in range(n)], collate, f"{n:,} labelled examples")
        picture = RunFolder(cfg.run.dir).plots / "confusion.png"
        scores = HeldOutScores(objective, cfg.examples, checked.held_out, collate, size, cfg.held_out.every, picture)

    def feed(engine: Engine, state: Mapping[str, Any]) -> ExampleFeed:
        return ExampleFeed(
            checked.order,
            labelled(checked.train, n_ctx, multiple),
            held_out,
            engine.mesh,
            step=state.get("step", 0),
            state=state.get("data", {}),
            about={**checked.about, "labels": labels_digest(checked)},
            micro_batch_size=size,
            n_ctx=n_ctx,
            fixed=False,
            lines=[],
        )

    return Task(
        objective,
        feed,
        model=partial(WithHead, n_out=len(cfg.examples.classes) if kind is Kind.classification else 1, std=0.02),
        eval_every=cfg.held_out.every,
        patience=cfg.held_out.patience,
        tokenizer=checked.tokenizer.raw,
        scores=scores,
    )


def labels_digest(checked: Checked[FinetuneConfig, Labelled, TaskRenderer]) -> str:
    """A name of the labels in the order of the examples, and of the task that they are of."""
    labels = np.array([example.label for example in checked.train], np.float64).tobytes()
    return hashlib.sha256(checked.cfg.examples.task.value.encode() + labels).hexdigest()[:16]


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(FinetuneConfig, finetune)

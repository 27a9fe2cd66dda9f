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

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

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
    from trainer.task import Task


def finetune(cfg: FinetuneConfig) -> None:
    """Tune a language model, and a head that is new, on the labelled examples of one task."""
    if cfg.held_out.given:
        from trainer.tuning.figures import check_figures

        check_figures(cfg.examples.task)
    world = read_world()

    def read(path: str, tokenizer: Tokenizer, n_ctx: int) -> Examples[Labelled, TaskRenderer]:
        return read_labelled(replace(cfg.examples, path=path), tokenizer, n_ctx)

    checked = check(cfg, world, cfg.examples.path, Reader(read, all_ids, side=texts_of))
    optim = warmed_up(cfg.optim, cfg.warmup_share, checked.cfg.max_steps)
    checked = replace(checked, cfg=replace(checked.cfg, optim=optim))
    kept = f"freeze: the first {cfg.freeze} of {cfg.model.n_layer} blocks keep their weights" if cfg.freeze else ""
    run_task(checked.cfg, world, workload(checked), lambda: labelled_task(checked), [*checked.lines, kept])


def texts_of(example: Labelled) -> np.ndarray:
    """The ids of all sequences of an example."""
    return np.concatenate(example.sequences)


def all_ids(example: Labelled) -> np.ndarray:
    """The ids of an example, and the bits of its label."""
    return np.append(texts_of(example), np.array([example.label]).view(np.int32))


def warmed_up(optim: OptimConfig, share: float, max_steps: int) -> OptimConfig:
    """`optim` with a warm-up over a share of the steps, unless its schedule has one."""
    if optim.schedule.warmup or optim.schedule.unit is not Unit.steps:
        return optim
    return replace(optim, schedule=replace(optim.schedule, warmup=round(share * max_steps)))


def workload(checked: Checked[FinetuneConfig, Labelled, TaskRenderer]) -> Workload:
    """The workload of a step whose rows are as long as the longest example, one for each example: the least."""
    longest = max(len(ids) for example in checked.train for ids in example.sequences)
    work = checked.workload
    return replace(work, model=replace(work.model, n_ctx=longest), tokens_per_step=checked.cfg.batch_size * longest)


def labelled_task(checked: Checked[FinetuneConfig, Labelled, TaskRenderer]) -> Task:
    """The task of fine-tuning: a head's loss and the language model's, over labelled examples."""
    from trainer.data.collate import row_multiple
    from trainer.data.labelled import labelled
    from trainer.objective.heads import WithHead
    from trainer.objective.labelled import LabelledTask
    from trainer.task import Task
    from trainer.tuning.feed import make_feed
    from trainer.tuning.scores import HeldOutScores

    cfg, kind, examples = checked.cfg, checked.cfg.examples.task, checked.held_out
    objective = LabelledTask(kind, cfg.lm_weight, cfg.head_dropout)
    collate = partial(labelled, n_ctx=cfg.model.n_ctx, multiple=row_multiple(cfg.parallel.tp))
    scores = None
    if examples:
        size, picture = int(cfg.micro_batch_size), RunFolder(cfg.run.dir).plots / "confusion.png"
        scores = HeldOutScores(objective, cfg.examples, examples, collate(examples), size, cfg.held_out.every, picture)
    n_out = len(cfg.examples.classes) if kind is Kind.classification else 1
    return Task(
        objective,
        make_feed(checked, collate, "labelled examples"),
        model=partial(WithHead, n_out=n_out, std=0.02, frozen=cfg.freeze),
        eval_every=cfg.held_out.every,
        patience=cfg.held_out.patience,
        tokenizer=checked.tokenizer.raw,
        scores=scores,
    )


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(FinetuneConfig, finetune)

"""Entry: `python -m trainer.evaluate checkpoint=RUN tasks='[lambada,piqa]' task_data=DIR`, alone or under torchrun.

Tasks and their files are checked before the model is loaded; answers are kept in a journal, so that the same command
goes on where it was interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import run
from trainer.config.inference import EvaluateConfig
from trainer.distributed.world import read_world
from trainer.evaluation.curves import draw_curves
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.evaluation import Plan, of_group, plan_task
from trainer.evaluation.harness.run import check_installed, plan_tasks
from trainer.evaluation.kinds.kind import Outcome
from trainer.evaluation.overlap import Overlap
from trainer.evaluation.report import publish_report, result_of, table
from trainer.evaluation.subject import Subject
from trainer.evaluation.tasks.description import Reference
from trainer.evaluation.tasks.find import is_ours, load_groups, load_tasks
from trainer.model.arithmetic import param_count
from trainer.run.folder import RunFolder
from trainer.tracking.sync import sync_beside


def evaluate(cfg: EvaluateConfig) -> None:
    """Score a checkpoint on tasks and write the report."""
    began, world = time.monotonic(), read_world()
    subject = Subject.find(cfg.checkpoint, cfg.tokenizer, cfg.precision)
    ours = [name for name in cfg.tasks if is_ours(name)]
    others = [name for name in cfg.tasks if name not in ours]
    for name in others:
        if cfg.against:
            raise UserError(
                f"against= divides our own tasks alone, and {name} is none of them: leave it out of tasks, or against"
            )
        check_installed(name)
    plans, groups = _plans(cfg, ours), load_groups(ours)
    encoder = Encoder(subject.tokenizer)
    asked = {plan.name: plan.prepared(encoder, subject.cfg.n_ctx) for plan in plans}
    harness = plan_tasks(others, task_data=cfg.task_data, **_settings(cfg)) if others else None
    overlap = Overlap.plan(cfg.against, plans) if cfg.against else None
    folder = subject.folder(cfg.output)
    from trainer.evaluation.journal import Journal  # from here on torch
    from trainer.evaluation.scoring import Scoring

    with subject.loaded(world, cfg.tp) as model:
        dirty = overlap.search(world, folder.parent / "overlap") if overlap else {}
        journal = Journal(folder / "journal", world.rank)
        scoring = Scoring(model, journal, cfg.batch_size, subject.tokenizer.decode)
        outcomes = {name: measure(scoring) for name, measure in asked.items()}
        outcomes |= {name: of_group([outcomes[t] for t in group.described(name)]) for name, group in groups.items()}
        outcomes |= harness.run(scoring, encoder) if harness else {}
        if overlap is not None:  # the answers to parts of the questions are in the journal
            overlap.divide(plans, outcomes, dirty, lambda part: part.prepared(encoder, subject.cfg.n_ctx)(scoring))
        journal.close()
    if world.is_main:
        references = {plan.name: plan.task.references for plan in plans}
        references |= {name: group.references for name, group in groups.items()}
        _report(cfg, subject, folder, references, outcomes, time.monotonic() - began)


def _plans(cfg: EvaluateConfig, names: list[str]) -> list[Plan]:
    return [plan_task(name, task, cfg.task_data, **_settings(cfg)) for name, task in load_tasks(names).items()]


def _settings(cfg: EvaluateConfig) -> dict[str, Any]:
    """The settings that every task is run with."""
    return {"shots": cfg.shots, "limit": cfg.limit, "seed": cfg.seed, "max_new_tokens": cfg.max_new_tokens}


def _report(
    cfg: EvaluateConfig,
    subject: Subject,
    folder: Path,
    references: dict[str, tuple[Reference, ...]],
    outcomes: dict[str, Outcome],
    seconds: float,
) -> None:
    results = {name: result_of(outcome) for name, outcome in outcomes.items()}
    report: dict[str, Any] = {
        "results": results,
        "model": subject.cfg.name,
        "checkpoint": str(subject.checkpoint),
        "seconds": round(seconds, 3),
    }
    settings = {"tasks": cfg.tasks, **_settings(cfg)} | ({"against": cfg.against} if cfg.against else {})
    path = publish_report(folder, settings, report, outcomes)
    draw_curves(path)
    if cfg.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(table(results, references, param_count(subject.cfg)))
        print(f"report: {path}", file=sys.stderr)
    run_folder = RunFolder(folder.parent.parent)
    if folder.parent == run_folder.evaluations:  # not another output=
        sync_beside(run_folder)


if __name__ == "__main__":
    run(EvaluateConfig, evaluate)

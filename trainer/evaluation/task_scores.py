"""Scores on tasks while a model trains: what it knows by now, by the tasks of eval.tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING

from conf.errors import UserError
from conf.hints import near
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.model import ModelConfig
from trainer.config.pretrain import EvalConfig
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.evaluation import plan_task
from trainer.evaluation.kinds.kind import Measure, Outcome
from trainer.evaluation.report import STDERR
from trainer.evaluation.tasks.find import is_file, is_ours, known_tasks, load_task, short

if TYPE_CHECKING:
    from trainer.model.gpt import GPT

SEED = 0  # of demonstrations and drawn texts: that of `python -m trainer.evaluate`, whose figures these are


class TaskScores:
    """The tasks of a run as token ids, on which its model is scored on any layout."""

    def __init__(self, cfg: EvalConfig, tokenizer: Tokenizer, model: ModelConfig, batch_size: int) -> None:
        """`batch_size`: texts that each data-parallel rank computes at a time.

        Raises:
            UserError: a task that is none of ours, lacks its files, or cannot be asked in n_ctx tokens.
        """
        self.every = cfg.tasks_every
        self._batch_size = batch_size
        self._decode = tokenizer.decode
        encoder = Encoder(tokenizer)
        self._tasks: dict[str, Measure] = {}  # by the names of their metrics
        for given in cfg.tasks:
            name = _name(given)
            if name in self._tasks:
                raise UserError(f"eval.tasks={cfg.tasks}: two tasks are {name} in the metrics: rename one of the files")
            plan = plan_task(
                given,
                load_task(given, "eval.tasks"),
                cfg.task_data,
                shots=None,
                limit=cfg.tasks_limit,
                seed=SEED,
                setting="eval.task_data",
            )
            self._tasks[name] = plan.prepared(encoder, model.n_ctx)

    def find(self, model: GPT, loss: float, on_progress: Callable[[], None]) -> tuple[dict[str, float], str]:
        """The metrics `task/NAME/METRIC` with n and standard errors, and a line of them. Collective.

        `loss`: the newest, the same on all ranks; where it is not finite, the line says so, and there are no metrics.
        `on_progress` is called at each batch.
        """
        if not math.isfinite(loss):
            return {}, f"no scores on tasks: the loss is {loss}"
        from trainer.evaluation.journal import Journal
        from trainer.evaluation.scoring import Scoring

        began = monotonic()
        scoring = Scoring(model, Journal(None, model.mesh.world.rank), self._batch_size, self._decode, on_progress)
        outcomes = {name: measure(scoring) for name, measure in self._tasks.items()}
        row = {f"task/{name}/{key}": x for name, outcome in outcomes.items() for key, x in _numbers(outcome).items()}
        told = ", ".join(f"{name} {_first(outcome.figures)}" for name, outcome in outcomes.items())
        return row, f"tasks: {told} ({monotonic() - began:.0f} s)"


def _name(given: str) -> str:
    """The name of a task in metrics. Raises UserError for one that is not ours, or that MLflow would refuse."""
    if not is_ours(given):
        raise UserError(
            f"eval.tasks=[{given}]: no task of conf/task/{near(given, known_tasks())}, and a training runs none of "
            "lm-evaluation-harness, which may ask the network for its data: give a name of docs/evaluation.md or a "
            f"YAML file, or score a checkpoint by python -m trainer.evaluate checkpoint=RUN tasks=[{given}]"
        )
    name = short(given)
    if is_file(given) and not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise UserError(
            f"eval.tasks=[{given}]: {name!r} is no name of a metric: rename the file, with letters, digits, _, - and . "
            "alone"
        )
    return name


def _numbers(outcome: Outcome) -> dict[str, float]:
    """n, the figures, and the counts among the notes, such as that of contexts that were cut."""
    counts = {key: float(x) for key, x in outcome.notes.items() if isinstance(x, int)}
    return {"n": float(outcome.n), **outcome.figures, **counts}


def _first(figures: Mapping[str, float]) -> str:
    """`acc 0.5120 ± 0.0158`: the first figure, which is the kind's own."""
    key, value = next(iter(figures.items()))
    error = figures.get(key + STDERR, math.nan)
    return f"{key} {value:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")

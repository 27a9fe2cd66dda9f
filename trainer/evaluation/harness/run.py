"""Tasks of lm-evaluation-harness over one of our models, and their figures as an `Outcome`."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError, of_nature
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.harness.local_data import descriptions, offline, splits_in
from trainer.evaluation.harness.model import model_class
from trainer.evaluation.kinds.kind import Outcome

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring

PREFIX = "lm_eval/"  # before the name of one of its tasks, where a task of ours has the same
BOOTSTRAPS = 1000  # of standard errors that have no formula


def check_installed(name: str) -> None:
    """Raises UserError if lm_eval is not installed; `name`: the task that needs it."""
    if not importlib.util.find_spec("lm_eval"):
        raise UserError(
            f"tasks=[{name}]: no task of conf/task/, and lm-evaluation-harness, which may know it, is not installed: "
            "pip install 'gradus[eval]'"
        )


@dataclass(frozen=True)
class HarnessPlan:
    """Tasks of the harness with their documents, read before any model is loaded."""

    given: dict[str, str]  # by the harness's name: the name that was given
    parts: list[dict[str, Any]]  # as its TaskManager loads them
    limit: int | None
    seed: int

    def run(self, scoring: Scoring, encoder: Encoder) -> dict[str, Outcome]:
        """The harness's own figures by the names that were given; those of a group by its tasks. Collective, as
        `Scoring`; empty but on the first rank of a node, as the harness counts."""
        from lm_eval.evaluator import evaluate  # not simple_evaluate, which lists all installed packages

        outcomes: dict[str, Outcome] = {}
        model = model_class()(scoring, encoder)
        for part in self.parts:
            with _quiet(), _seeded(self.seed):
                found = evaluate(lm=model, task_dict=part, limit=self.limit, bootstrap_iters=BOOTSTRAPS)
            outcomes |= {task: _outcome(found, task) for task in found["results"]} if found else {}
        return {self.given.get(task, task): outcome for task, outcome in outcomes.items()}


def plan_tasks(
    names: Sequence[str],
    *,
    task_data: str | None,
    shots: int | None,
    limit: int | None,
    seed: int,
    max_new_tokens: int | None,
) -> HarnessPlan:
    """The harness's tasks of these names, ready to run.

    A task NAME of which `task_data`/NAME holds splits, such as validation.jsonl or test.parquet, reads them instead of
    Hugging Face's hub.

    Raises:
        UserError: a task that the harness does not know, or cannot read.
    """
    asked = [name.removeprefix(PREFIX) for name in names]
    held = {name: splits_in(Path(task_data) / name) for name in asked} if task_data else {}
    local = {name: splits for name, splits in held.items() if splits}
    others = [name for name in asked if name not in local]
    parts = []
    with _quiet(), _seeded(seed):
        if local:
            with offline(), descriptions(local) as folder:  # before lm_eval, whose libraries look at it once
                parts.append(_load(list(local), folder))
        if others:
            parts.append(_load(others, None))
    for name, task in (item for part in parts for item in part["tasks"].items()):
        _set(name, task, shots, seed, max_new_tokens)
    return HarnessPlan(dict(zip(asked, names, strict=True)), parts, limit, seed)


def _load(names: list[str], folder: str | None) -> dict[str, Any]:
    """The tasks described in a folder, or the harness's own."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=folder is None)  # which are 16,000 files
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"tasks=[{unknown[0]}]: neither a task of conf/task/ nor of lm-evaluation-harness")
    try:
        return dict(manager.load(names))
    except Exception as e:  # whatever the harness and datasets raise
        why = e.__cause__ or e
        message = (
            f"lm-evaluation-harness cannot read {', '.join(names)} ({type(why).__name__}: {str(why)[:300]}): its data "
            f"come from Hugging Face's hub, or from task_data=DIR with files such as DIR/{names[0]}/validation.jsonl"
        )
        raise of_nature(e, message) from e


def _set(name: str, task: Any, shots: int | None, seed: int, max_new_tokens: int | None) -> None:
    """Put the user's settings into a task of the harness."""
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise UserError(f"shots={shots}: the harness's task {name} takes no demonstrations: give shots=0")
    if shots is not None or own is None:
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=seed)
    if max_new_tokens is not None and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)


def _outcome(found: Any, task: str) -> Outcome:
    figures: dict[str, float] = {}
    for key, value in found["results"][task].items():
        metric, _, rule = key.partition(",")
        if isinstance(value, int | float) and rule:
            figures[metric if rule == "none" else f"{metric}/{rule}"] = float(value)
    n = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
    samples = json.loads(json.dumps(found.get("samples", {}).get(task, []), default=str))
    shots = found.get("n-shot", {}).get(task, 0)
    return Outcome(
        n, figures, samples, {"harness": f"lm_eval {version('lm_eval')}"} | ({"shots": shots} if shots else {})
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and NumPy's own generators, which tasks draw from, start from `seed`; then they go on as before."""
    import numpy as np

    before, before_np = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_np)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's words on stdout, which is for our own line."""
    with warnings.catch_warnings(), redirect_stdout(None):
        warnings.simplefilter("ignore")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        yield

"""Facts of a run that MLflow keeps beside its rows, from its folder: params, tags, files, figures of evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from conf.frozen import by_key
from data_pipeline.files import read_json
from trainer.run.folder import RunFolder
from trainer.run.redact import redact_tree

PARAM_CHARS = 6000  # MLflow's limit
CHECKPOINT = ("manifest.json", "state.json")


def of_config(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The values that a config sets, as params; config.yaml has all."""
    values = by_key(redact_tree(cfg))
    return {key: _cut(_text(value)) for key, value in values.items() if value is not None and value != {}}


def of_starts(folder: RunFolder, starts: Iterable[int]) -> dict[str, str]:
    """`start.N.KEY`: `old -> new` of each value that start N has changed: a param is final, so each has its own."""
    changed = {f"start.{n}.{key}": text for n in starts for key, text in folder.facts(n).get("changed", {}).items()}
    return {key: _cut(str(text)) for key, text in redact_tree(changed).items()}


def of_code(environment: Mapping[str, Any]) -> dict[str, str]:
    """Tags of the code of a start, from its file in environment/."""
    code, argv = environment["code"], environment["command"]
    program = argv[argv.index("-m") + 1] if "-m" in argv[:-1] else argv[0]
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": program}
    if code.get("commit"):
        tags |= {"mlflow.source.git.commit": str(code["commit"]), "gradus.dirty": json.dumps(code.get("dirty"))}
    return tags


def files_of(folder: RunFolder) -> Iterator[Path]:
    """The files of a run that are stored with it; some may not be there."""
    yield from (folder.config, folder.mixture, *sorted(folder.plots.glob("*.png")))
    yield from sorted(folder.environments.glob("[0-9]*.json"))
    yield from sorted(folder.samples.glob("step-*.txt"))
    yield from sorted(folder.evaluations.glob("step-*/report-*.json"))
    yield from (*folder.evaluations.glob("steps.png"), *folder.evaluations.glob("step-*/shots.png"))
    yield from (path / name for path in folder.published() for name in CHECKPOINT)


def task_key(task: str, metric: str, shots: int) -> str:
    """The key of a task's figure, task/NAME/METRIC or task/NAME/5-shot/METRIC; a task in a file has the file's name.

    Letters that MLflow takes in no key become underscores.
    """
    name = Path(task).stem if task.endswith(".yaml") else task
    return f"task/{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}/{f'{shots}-shot/' if shots else ''}{metric}"


def read_figures(report: Path) -> dict[str, float]:
    """The figures of a report of `trainer.evaluate`, and n of each task. Raises UserError for a damaged file."""
    body = read_json(report, "move it away")
    own = body["settings"].get("shots") is None  # as many demonstrations as each task says
    return {
        task_key(task, name, 0 if own else int(result.get("shots", 0))): float(value)
        for task, result in body["results"].items()
        for name, value in result.items()
        if isinstance(value, float) or name == "n"
    }


def _cut(text: str) -> str:
    return text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 1] + "…"


def _text(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    return value if isinstance(value, str) else json.dumps(value)

"""Tasks by name: the descriptions in conf/task/, YAML files of users, and groups of tasks."""

from __future__ import annotations

from pathlib import Path

import conf
from conf.errors import UserError
from conf.frozen import peek
from conf.hints import near
from data_pipeline.files import from_json
from trainer.evaluation.tasks.description import TaskConfig

FOLDER = Path(conf.__file__).resolve().parent / "task"
SUFFIX = ".yaml"


def known_tasks() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def is_file(name: str) -> bool:
    """True for a task that is given as a YAML file, not by name."""
    return name.endswith((SUFFIX, ".yml"))


def load_task(name: str) -> TaskConfig:
    """The task of conf/task/NAME.yaml, or of a YAML file of the user.

    Raises:
        UserError: no such task, or a file that describes none; names what is wrong.
    """
    if not is_file(name) and name not in known_tasks():
        others = f"; there are {', '.join(known_tasks())}"
        raise UserError(f"tasks=[{name}]: no such task{near(name, known_tasks()) or others}")
    path = Path(name) if is_file(name) else FOLDER / f"{name}{SUFFIX}"
    try:
        body = peek(path)
    except UserError as e:
        raise type(e)(f"tasks=[{name}]: {path}: {e}") from None
    return from_json(TaskConfig, body, path, "correct it; docs/evaluation.md describes a task")

"""Tasks by name: the descriptions in conf/task/, and YAML files of users; each describes a task, or a group of some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import conf
from conf.errors import UserError
from conf.frozen import peek
from conf.hints import near
from data_pipeline.files import from_json
from trainer.evaluation.tasks.description import TaskConfig
from trainer.evaluation.tasks.groups import GroupConfig

FOLDER = Path(conf.__file__).resolve().parent / "task"
SUFFIX = ".yaml"


def known_tasks() -> list[str]:
    """The names of conf/task/, groups too."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def is_file(name: str) -> bool:
    """True for a task that is given as a YAML file, not by name."""
    return name.endswith((SUFFIX, ".yml"))


def is_ours(name: str) -> bool:
    """True for a name of conf/task/, a YAML file, and GROUP/TASK of a group of conf/task/."""
    return is_file(name) or name in known_tasks() or name.partition("/")[0] in known_tasks()


def short(name: str) -> str:
    """The name without folder and suffix of a YAML file: a task does not change with the place of its description."""
    return Path(name).stem if is_file(name) else name


def load_tasks(names: Sequence[str], setting: str = "tasks") -> dict[str, TaskConfig]:
    """The tasks of these names, each once; those of a group as GROUP/TASK. `setting`: the user's name for the list.

    Raises:
        UserError: no such task, or a file that describes none; names what is wrong.
    """
    tasks: dict[str, TaskConfig] = {}
    for name in names:
        within, apart, _ = (name, "", "") if is_file(name) else name.partition("/")
        found = load(within, setting)
        every = found.described(within) if isinstance(found, GroupConfig) else {within: found}
        if apart and name not in every:
            raise UserError(f"{setting}=[{name}]: no such task{near(name, every)}: {within} has {', '.join(every)}")
        tasks |= {name: every[name]} if apart else every
    return tasks


def load_groups(names: Sequence[str]) -> dict[str, GroupConfig]:
    """Those of the names that are groups. Raises as `load_tasks`."""
    found = {name: load(name) for name in names if is_file(name) or name in known_tasks()}
    return {name: group for name, group in found.items() if isinstance(group, GroupConfig)}


def load_task(name: str, setting: str = "tasks") -> TaskConfig:
    """The one task of a name. Raises UserError for a group, too, and as `load_tasks`."""
    found = load_tasks([name], setting)
    if len(found) != 1:
        raise UserError(f"{setting}=[{name}]: it is a group of {len(found)} tasks: give one of {', '.join(found)}")
    return next(iter(found.values()))


def load(name: str, setting: str = "tasks") -> TaskConfig | GroupConfig:
    """The task or the group that the file of a name describes. Raises as `load_tasks`."""
    if not is_file(name) and name not in known_tasks():
        others = f"; there are {', '.join(known_tasks())}"
        raise UserError(f"{setting}=[{name}]: no such task{near(name, known_tasks()) or others}")
    path = Path(name) if is_file(name) else FOLDER / f"{name}{SUFFIX}"
    try:
        body = peek(path)
    except UserError as e:
        raise type(e)(f"{setting}=[{name}]: {path}: {e}") from None
    cure = "correct it; docs/evaluation.md describes a task"
    return from_json(GroupConfig, body, path, cure) if "tasks" in body else from_json(TaskConfig, body, path, cure)

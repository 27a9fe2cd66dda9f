"""Groups of tasks: one name and one YAML for tasks that differ in little, with the mean of their figures.

A group's description gives `forms`, the kinds of its tasks, and for each task its form, file, shots and guessing.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import UserError
from trainer.evaluation.tasks.description import (
    Centred,
    CentredFigure,
    Choices,
    Completion,
    Data,
    Reference,
    TaskConfig,
)


@dataclass(frozen=True)
class Form:
    """The parts that tasks of one kind share; `figure`: the one that is centred, `acc` or `acc_per_token`."""

    figure: CentredFigure
    choices: Choices | None = None
    completion: Completion | None = None


@dataclass(frozen=True)
class Member:
    """A task of a group."""

    form: str  # a name of the group's `forms`
    file: str  # JSON lines, below the group's `folder`
    guessing: float  # the figure of who guesses
    shots: int = 0
    documents: int | None = None  # null = not known
    sha256: str | None = None  # null = not known


@dataclass(frozen=True)
class GroupConfig:
    """Tasks under one name; the group's figure is the mean of their centred ones."""

    about: str
    source: str  # an address where people get the files
    folder: str  # of the files, below task_data
    forms: dict[str, Form]
    tasks: dict[str, Member]
    start: bool = False  # as a task's
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        for name, member in self.tasks.items():
            if member.form not in self.forms:
                raise UserError(f"tasks.{name}.form={member.form}: give one of {', '.join(self.forms)}")
        self.described("")

    def described(self, group: str) -> dict[str, TaskConfig]:
        """Its tasks by name, GROUP/TASK.

        Raises:
            UserError: as a `TaskConfig` of its own does.
        """
        return {f"{group}/{name}": self._task(member) for name, member in self.tasks.items()}

    def _task(self, member: Member) -> TaskConfig:
        form = self.forms[member.form]
        return TaskConfig(
            about=self.about,
            data=Data({f"{self.folder}/{member.file}": member.sha256}, "jsonl", member.documents, self.source),
            choices=form.choices,
            completion=form.completion,
            shots=member.shots,
            start=self.start,
            centred=Centred(form.figure, member.guessing),
        )

"""The interface of a kind of task, and what each has found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trainer.evaluation.encoder import Encoder
from trainer.evaluation.prompts import Prompts
from trainer.evaluation.tasks.templates import Document

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring


class Question(NamedTuple):
    """A document that is asked about; `number`: its place in the task's files, from 0."""

    number: int
    document: Document


@dataclass
class Outcome:
    """`figures`: by metric, each with NAME_stderr beside it where there is one. `samples`: one for each question, as
    JSON. `notes`: counts and rules that a figure cannot be read without. `parts`: n and figures of some questions."""

    n: int
    figures: dict[str, float]
    samples: list[dict[str, Any]]
    notes: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)


Measure = Callable[["Scoring"], Outcome]  # asks a model; as often as one likes. Collective, as `Scoring`


class Kind(Protocol):
    """One task of a kind. Raises UserError at its making for a template that is none."""

    def demonstration(self, document: Document) -> str:
        """The question with its right answer."""
        ...

    def prepare(self, questions: Sequence[Question], prompts: Prompts, encoder: Encoder, n_ctx: int) -> Measure:
        """The questions as token ids, for any model of this vocabulary and n_ctx.

        Raises:
            UserError: a question that cannot be asked.
        """
        ...

"""Evaluation of one model on tasks: documents, demonstrations, questions, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.kinds.choices import ChoicesKind
from trainer.evaluation.kinds.completion import CompletionKind
from trainer.evaluation.kinds.generation import GenerationKind
from trainer.evaluation.kinds.kind import Kind, Measure, Outcome, Question
from trainer.evaluation.kinds.perplexity import PerplexityKind
from trainer.evaluation.prompts import Prompts
from trainer.evaluation.tasks.description import Centred, TaskConfig
from trainer.evaluation.tasks.documents import read_documents
from trainer.evaluation.tasks.find import short
from trainer.evaluation.tasks.templates import expression

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring


@dataclass(frozen=True)
class Plan:
    """One task with its documents, checked before any model is loaded."""

    name: str
    task: TaskConfig
    kind: Kind
    questions: Sequence[Question]
    prompts: Prompts

    def prepared(self, encoder: Encoder, n_ctx: int) -> Measure:
        """The task in token ids, which asks models of this vocabulary and n_ctx.

        Raises:
            UserError: a question that cannot be asked.
        """
        encoder = Encoder(encoder.tokenizer, always=self.task.start)
        ask = self.kind.prepare(self.questions, self.prompts, encoder, n_ctx)
        counts = {"shots": self.prompts.shots, "fewer_shots": self.prompts.reduced}
        notes: dict[str, Any] = {name: n for name, n in counts.items() if n}
        notes |= {"sha256": "of some files not known"} if None in self.task.data.files.values() else {}
        notes |= {"start": "the vocabulary has no end-of-text token"} if self.task.start and not encoder.start else {}

        def measure(scoring: Scoring) -> Outcome:
            outcome = ask(scoring)
            outcome.notes |= notes
            if self.task.centred is not None:
                outcome.figures |= _centred(outcome.figures, self.task.centred)
            return outcome

        return measure


def of_group(outcomes: Sequence[Outcome]) -> Outcome:
    """A group's figure, the mean of its tasks' `centred`; its standard error takes the tasks as independent."""
    figures = [outcome.figures for outcome in outcomes]
    mean = math.fsum(f["centred"] for f in figures) / len(figures)
    stderr = math.sqrt(math.fsum(f["centred_stderr"] ** 2 for f in figures)) / len(figures)
    n = sum(outcome.n for outcome in outcomes)
    return Outcome(n, {"centred": mean, "centred_stderr": stderr}, [], {"tasks": len(figures)})


def _centred(figures: Mapping[str, float], how: Centred) -> dict[str, float]:
    known = 1 - how.guessing
    return {
        "centred": (figures[how.figure] - how.guessing) / known,
        "centred_stderr": figures[f"{how.figure}_stderr"] / known,
    }


def plan_task(
    name: str,
    task: TaskConfig,
    folder: str | None,
    *,
    shots: int | None,
    limit: int | None,
    seed: int,
    max_new_tokens: int | None = None,
    setting: str = "task_data",
) -> Plan:
    """The task, ready to run: its files read, its templates tried on the first question.

    Args:
        folder: that holds the task's files; `setting`: the user's name for it.
        shots: None: as many as the task says; where a task takes none, more than 0 is an error.
        limit: the first questions alone.
        max_new_tokens: of a text that the model writes; None: as many as the task says.

    Raises:
        UserError: whatever is wrong with the description or the files.
    """
    if task.generation is not None and max_new_tokens is not None:
        task = replace(task, generation=replace(task.generation, max_new_tokens=max_new_tokens))
    kind = _kind(name, task, seed)
    documents = read_documents(name, task.data, folder, setting)
    questions = [Question(i, document) for i, document in enumerate(documents)]
    if task.where is not None:
        taken = expression(f"{name}: where", task.where)
        questions = [q for q in questions if taken(q.document)]
    if not questions:
        raise UserError(f"task {name}: `where: {task.where}` takes none of its {len(documents)} documents: correct it")
    if shots and task.perplexity is not None:
        raise UserError(f"shots={shots}: task {name} is a perplexity and takes no demonstrations: give shots=0")
    apart = task.demonstrations if shots != 0 else None
    pool = read_documents(name, apart, folder, setting) if apart else documents
    prompts = Prompts(short(name), task, pool, kind.demonstration, task.shots if shots is None else shots, seed)
    kind.demonstration(questions[0].document)
    return Plan(name, task, kind, questions[:limit], prompts)


def _kind(name: str, task: TaskConfig, seed: int) -> Kind:
    if task.choices is not None:
        return ChoicesKind(name, task.choices)
    if task.completion is not None:
        return CompletionKind(name, task.completion)
    if task.perplexity is not None:
        return PerplexityKind(name, task.perplexity)
    assert task.generation is not None  # TaskConfig has exactly one
    return GenerationKind(name, task.generation, seed)

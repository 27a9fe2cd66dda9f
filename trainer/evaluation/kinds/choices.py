"""Multiple choice: the option of the highest probability, by four normalisers from one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from trainer.evaluation.answers import Likelihood
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.kinds.kind import Measure, Outcome, Question
from trainer.evaluation.kinds.metrics import label_f1, matthews, mean_and_stderr
from trainer.evaluation.prompts import Prompts
from trainer.evaluation.tasks.description import Choices
from trainer.evaluation.tasks.templates import Document, expression, template
from trainer.inference.requests import Pair

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring

LABEL_FIGURES: dict[str, Callable[[list[int], list[int]], float]] = {
    "f1": label_f1,
    "macro_f1": partial(label_f1, average="macro"),
    "matthews": matthews,
}


@dataclass(frozen=True)
class _Option:
    text: str
    context: str
    continuation: str


class ChoicesKind:
    """`acc`: by the log-probability of the continuation; `acc_per_token` and `acc_per_byte`: divided by its tokens, or
    by the bytes of the option; `acc_unconditional`: less its log-probability after `unconditional` alone; `f1`,
    `macro_f1` or `matthews`: of the indices, chosen as `acc` does."""

    def __init__(self, name: str, cfg: Choices) -> None:
        self.cfg = cfg
        self._name = name
        self._options = [template(f"{name}: options", text) for text in cfg.options]
        self._options_from = expression(f"{name}: options_from", cfg.options_from) if cfg.options_from else None
        self._correct = expression(f"{name}: correct", cfg.correct)
        self._context = template(f"{name}: context", cfg.context)
        self._continuation = template(f"{name}: continuation", cfg.continuation)

    def demonstration(self, document: Document) -> str:
        options, correct = self._read(document)
        return options[correct].context + options[correct].continuation

    def prepare(self, questions: Sequence[Question], prompts: Prompts, encoder: Encoder, n_ctx: int) -> Measure:
        read = [self._read(q.document) for q in questions]
        pairs: list[Pair] = []
        for q, (options, _) in zip(questions, read, strict=True):

            def fits(prompt: str, options: list[_Option] = options) -> bool:
                lengths = (sum(map(len, encoder.pair(prompt + o.context, o.continuation))) for o in options)
                return all(length <= n_ctx + 1 for length in lengths)

            before = prompts.before(q.number, fits)
            pairs += [encoder.pair(before + o.context, o.continuation) for o in options]
        bare = self._unconditional([options for options, _ in read], encoder)

        def measure(scoring: Scoring) -> Outcome:
            answers = scoring.likelihoods(self._name, pairs)
            alone = scoring.likelihoods(f"{self._name}, unconditional", bare) if bare else [None] * len(pairs)
            samples, given = [], iter(zip(answers, alone, strict=True))
            for q, (options, correct) in zip(questions, read, strict=True):
                samples.append(self._judged(q, options, correct, [next(given) for _ in options]))
            cut = sum(sample.pop("cut") for sample in samples)
            return Outcome(len(samples), self._figures(samples), samples, {"contexts_cut": cut} if cut else {})

        return measure

    def _read(self, document: Document) -> tuple[list[_Option], int]:
        if self._options_from is not None:
            found = self._options_from(document)
            texts = [str(text) for text in found] if isinstance(found, list | tuple) else []
        else:
            texts = [make(document) for make in self._options]
        correct = self._correct(document)
        if not (isinstance(correct, int | str) and str(correct).isdecimal() and int(correct) < len(texts)):
            raise UserError(
                f"task {self._name}: `correct: {self.cfg.correct}` gives {correct!r} for {len(texts)} options {texts}: "
                "make it the index of an option, from 0"
            )
        return [self._option(document, text) for text in texts], int(correct)

    def _option(self, document: Document, text: str) -> _Option:
        fields = {**document, "option": text}
        return _Option(text, self._context(fields), self._continuation(fields))

    def _unconditional(self, read: list[list[_Option]], encoder: Encoder) -> list[Pair]:
        if (context := self.cfg.unconditional) is None:
            return []
        return [encoder.pair(context, o.continuation) for options in read for o in options]

    def _judged(
        self, q: Question, options: list[_Option], correct: int, answers: list[tuple[Likelihood, Likelihood | None]]
    ) -> dict[str, Any]:
        """The sample of a question: its options, their log-probabilities, and how right the model is by each rule."""
        scores = {
            "acc": [a.log_p for a, _ in answers],
            "acc_per_token": [a.log_p / a.tokens for a, _ in answers],
            "acc_per_byte": [
                a.log_p / max(1, len(o.text.encode())) for (a, _), o in zip(answers, options, strict=True)
            ],
        }
        if self.cfg.unconditional is not None:
            scores["acc_unconditional"] = [a.log_p - b.log_p for a, b in answers if b is not None]
        return {
            "document": q.number,
            "context": options[0].context,
            "options": [o.continuation for o in options],
            "correct": correct,
            "log_p": [a.log_p for a, _ in answers],
            "tokens": [a.tokens for a, _ in answers],
            "cut": any(a.cut for a, _ in answers),
            "right": {name: self._right(values, correct) for name, values in scores.items()},
        }

    def _right(self, scores: list[float], correct: int) -> float:
        best = max(scores)
        if scores[correct] < best:
            return 0.0
        alone = scores.count(best) == 1
        first = scores.index(best) == correct
        return 1.0 if alone else (self.cfg.ties or float(first))

    def _figures(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name in samples[0]["right"]:
            mean, stderr = mean_and_stderr([s["right"][name] for s in samples])
            figures |= {name: mean, f"{name}_stderr": stderr}
        if self.cfg.labels is not None:
            correct = [s["correct"] for s in samples]
            chosen = [s["log_p"].index(max(s["log_p"])) for s in samples]
            figures[self.cfg.labels] = LABEL_FIGURES[self.cfg.labels](correct, chosen)
        return figures

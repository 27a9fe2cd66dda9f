"""Multiple choice: the option of the highest probability, by four normalisers from one pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from trainer.evaluation.answers import Likelihood
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.kinds.kind import Measure, Outcome, Question
from trainer.evaluation.kinds.metrics import exact_match, label_f1, matthews, mean_and_stderr, token_f1
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
    `macro_f1` or `matthews`: of the indices, chosen as `acc` does; `acc_group`: all of a group are right, by `acc`;
    `exact_match` and `f1`: of the text of the option that `acc` takes, with the right ones, as `GenerationKind`."""

    def __init__(self, name: str, cfg: Choices) -> None:
        self.cfg = cfg
        self._name = name
        self._options = [template(f"{name}: options", text) for text in cfg.options]
        self._options_from = expression(f"{name}: options_from", cfg.options_from) if cfg.options_from else None
        self._correct = expression(f"{name}: correct", cfg.correct)
        self._group = expression(f"{name}: group_by", cfg.group_by) if cfg.group_by else None
        self._context = template(f"{name}: context", cfg.context)
        self._continuation = template(f"{name}: continuation", cfg.continuation)

    def demonstration(self, document: Document) -> str:
        options, correct = self._read(document)
        return options[correct[0]].context + options[correct[0]].continuation

    def prepare(self, questions: Sequence[Question], prompts: Prompts, encoder: Encoder, n_ctx: int) -> Measure:
        read = [self._read(q.document) for q in questions]
        pairs: list[Pair] = []
        for q, (options, _) in zip(questions, read, strict=True):

            def fits(prompt: str, options: list[_Option] = options) -> bool:
                lengths = (sum(map(len, encoder.pair(prompt + o.context, o.continuation))) for o in options)
                return all(length <= n_ctx + 1 for length in lengths)

            before = prompts.before(q.number, fits)
            pairs += SCORED[self.cfg.scored]([encoder.pair(before + o.context, o.continuation) for o in options])
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

    def _read(self, document: Document) -> tuple[list[_Option], list[int]]:
        """The options, and the indices of the right ones."""
        if self._options_from is not None:
            found = self._options_from(document)
            texts = [str(text) for text in found] if isinstance(found, list | tuple) else []
        else:
            texts = [make(document) for make in self._options]
        found = self._correct(document)
        correct = found if isinstance(found, list) else [found]
        if not correct or not all(
            isinstance(i, int | str) and str(i).isdecimal() and int(i) < len(texts) for i in correct
        ):
            raise UserError(
                f"task {self._name}: `correct: {self.cfg.correct}` gives {found!r} for {len(texts)} options {texts}: "
                "make it the index of an option, from 0, or a list of some"
            )
        return [self._option(document, text) for text in texts], [int(i) for i in correct]

    def _option(self, document: Document, text: str) -> _Option:
        fields = {**document, "option": text}
        return _Option(text, self._context(fields), self._continuation(fields))

    def _unconditional(self, read: list[list[_Option]], encoder: Encoder) -> list[Pair]:
        if (context := self.cfg.unconditional) is None:
            return []
        return [encoder.pair(context, o.continuation) for options in read for o in options]

    def _judged(
        self,
        q: Question,
        options: list[_Option],
        correct: list[int],
        answers: list[tuple[Likelihood, Likelihood | None]],
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
        right = {name: self._right(values, correct) for name, values in scores.items()}
        if self.cfg.texts:
            chosen = options[scores["acc"].index(max(scores["acc"]))].text
            answer_texts = [options[i].text for i in correct]
            right |= {"exact_match": exact_match(chosen, answer_texts), "f1": token_f1(chosen, answer_texts)}
        sample = {
            "document": q.number,
            "context": options[0].context,
            "options": [o.continuation for o in options],
            "correct": correct,
            "log_p": [a.log_p for a, _ in answers],
            "tokens": [a.tokens for a, _ in answers],
            "cut": any(a.cut for a, _ in answers),
            "right": right,
        }
        return sample | ({"group": self._group(q.document)} if self._group else {})

    def _right(self, scores: list[float], correct: list[int]) -> float:
        best = max(scores)
        right = [i in correct for i, score in enumerate(scores) if score == best]
        if not any(right):
            return 0.0
        return 1.0 if all(right) else (self.cfg.ties or float(right[0]))

    def _figures(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name in samples[0]["right"]:
            mean, stderr = mean_and_stderr([s["right"][name] for s in samples])
            figures |= {name: mean, f"{name}_stderr": stderr}
        if self.cfg.labels is not None:
            correct = [s["correct"][0] for s in samples]
            chosen = [s["log_p"].index(max(s["log_p"])) for s in samples]
            figures[self.cfg.labels] = LABEL_FIGURES[self.cfg.labels](correct, chosen)
        if self._group is not None:
            groups: dict[str, list[float]] = {}
            for s in samples:
                groups.setdefault(json.dumps(s["group"]), []).append(s["right"]["acc"])
            mean, stderr = mean_and_stderr([min(some) for some in groups.values()])
            figures |= {"acc_group": mean, "acc_group_stderr": stderr}
        return figures


def _from_difference(pairs: list[Pair]) -> list[Pair]:
    """Scored: the tokens from the first in which the texts differ, at least one of each."""
    texts = [context + ids for context, ids in pairs]
    n = _alike(texts)
    return [(ids[:n], ids[n:]) for ids in texts]


def _shared_end(pairs: list[Pair]) -> list[Pair]:
    """Scored: the tokens at the end that all texts share, at least one, and not the first of a text."""
    texts = [context + ids for context, ids in pairs]
    n = _alike([ids[::-1] for ids in texts])
    return [(ids[:-n], ids[-n:]) for ids in texts]


def _alike(texts: list[list[int]]) -> int:
    """The number of tokens with which all texts begin; at least one, and fewer than the shortest has."""
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False)))
    return max(1, min(same, min(map(len, texts)) - 1))


SCORED: dict[str, Callable[[list[Pair]], list[Pair]]] = {
    "continuation": list,
    "from_difference": _from_difference,
    "shared_end": _shared_end,
}

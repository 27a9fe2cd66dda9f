"""Generation: the model writes, and what it wrote is compared with right texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from trainer.evaluation.answers import Writing
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.kinds import metrics
from trainer.evaluation.kinds.kind import Measure, Outcome, Question
from trainer.evaluation.prompts import Prompts
from trainer.evaluation.tasks.description import Generation
from trainer.evaluation.tasks.templates import Document, expression, template
from trainer.inference.requests import Sampling

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring

GREEDY = Sampling(temperature=0.0)
JUDGES: dict[str, Callable[[str, list[str]], float]] = {
    "exact_match": metrics.exact_match,
    "exact_text": lambda text, answers: float(text in [answer.strip() for answer in answers]),
    "f1": metrics.token_f1,
    "coqa_f1": metrics.coqa_f1,
}


class GenerationKind:
    """`exact_match` and `f1`: the mean over questions of the best over their answers, normalised as SQuAD's;
    `coqa_f1`: each answer left out in turn; `exact_text`: letter by letter; `bleu`: of all texts together, 0 to 100;
    `rouge1`, `rouge2`, `rougeL` and their mean `rouge`."""

    def __init__(self, name: str, cfg: Generation, seed: int) -> None:
        metrics.check_installed(cfg.metric)
        self.cfg = cfg
        self._name = name
        self._context = template(f"{name}: context", cfg.context)
        self._answers = expression(f"{name}: answers", cfg.answers)
        self._answer = template(f"{name}: answer", cfg.answer)
        drawn = Sampling(top_k=cfg.top_k) if cfg.top_k else GREEDY
        self._how = Writing(drawn, cfg.max_new_tokens, cfg.stop, seed, cfg.beams, cfg.length_penalty)

    def demonstration(self, document: Document) -> str:
        return self._context(document) + self._answer({**document, "answers": self._read(document)})

    def prepare(self, questions: Sequence[Question], prompts: Prompts, encoder: Encoder, n_ctx: int) -> Measure:
        room = n_ctx - self.cfg.max_new_tokens
        if room < 1:
            raise UserError(
                f"task {self._name}: max_new_tokens={self.cfg.max_new_tokens} leave no room for a prompt in the "
                f"model's n_ctx={n_ctx}: give at most {n_ctx - 1}"
            )
        ids, cut = [], 0
        for q in questions:
            context = self._context(q.document)

            def fits(prompt: str, context: str = context) -> bool:
                return len(encoder.tokenizer.encode(prompt + context)) <= room

            prompt = prompts.before(q.number, fits) + context
            ids.append(encoder.prompt(prompt, room))
            cut += not fits(prompt, "")
        eot = encoder.tokenizer.eot_id
        answers = [self._read(q.document) for q in questions]

        def measure(scoring: Scoring) -> Outcome:
            new = scoring.continuations(self._name, ids, self._how, eot)
            texts = [self._written(encoder, some, eot) for some in new]
            samples = [self._sample(q, text) for q, text in zip(questions, texts, strict=True)]
            figures, notes = self._figures(texts, answers)
            if self.cfg.confidence:
                figures |= self._of_the_surest(scoring, ids, new, texts, answers)
            return Outcome(len(samples), figures, samples, notes | ({"contexts_cut": cut} if cut else {}))

        return measure

    def _of_the_surest(
        self,
        scoring: Scoring,
        prompts: list[list[int]],
        new: list[list[int]],
        texts: list[str],
        answers: list[list[str]],
    ) -> dict[str, float]:
        """The figure of the 1 % of texts with the highest probability of their tokens, one text at least."""
        written = [i for i, ids in enumerate(new) if ids]
        found = scoring.likelihoods(f"{self._name}, confidence", [(prompts[i], new[i]) for i in written])
        log_p = {i: answer.log_p for i, answer in zip(written, found, strict=True)}
        surest = sorted(range(len(texts)), key=lambda i: (-log_p.get(i, -math.inf), i))[: max(1, len(texts) // 100)]
        figures, _ = self._figures([texts[i] for i in surest], [answers[i] for i in surest])
        return {f"{name}_top_1_percent": value for name, value in figures.items()}

    def _read(self, document: Document) -> list[str]:
        found = self._answers(document)
        answers = [str(x) for x in found] if isinstance(found, list | tuple) else [str(found)]
        if not answers:
            raise UserError(f"task {self._name}: `answers: {self.cfg.answers}` gives no answer for {dict(document)}")
        return answers

    def _written(self, encoder: Encoder, ids: list[int], eot: int | None) -> str:
        text = encoder.tokenizer.decode([i for i in ids if i != eot])
        ends = [at for stop in self.cfg.stop if (at := text.find(stop)) >= 0]
        text = text[: min(ends)] if ends else text
        return metrics.first_sentences(text, self.cfg.sentences) if self.cfg.sentences else text.strip()

    def _sample(self, q: Question, text: str) -> dict[str, Any]:
        sample = {"document": q.number, "context": self._context(q.document), "answers": self._read(q.document)}
        return sample | {"text": text}

    def _figures(self, texts: list[str], answers: list[list[str]]) -> tuple[dict[str, float], dict[str, Any]]:
        if self.cfg.metric == "bleu":
            score, signature = metrics.bleu(texts, answers)
            return {"bleu": score}, {"bleu": signature}
        if self.cfg.metric == "rouge":
            return metrics.rouge(texts, [some[0] for some in answers]), {}
        judge = JUDGES[self.cfg.metric]
        mean, stderr = metrics.mean_and_stderr([judge(t, some) for t, some in zip(texts, answers, strict=True)])
        return {self.cfg.metric: mean, f"{self.cfg.metric}_stderr": stderr}, {}

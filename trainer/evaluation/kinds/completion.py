"""Completion: the probability of one right continuation, such as LAMBADA's last word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.evaluation.answers import Likelihood, Writing
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.kinds.kind import Measure, Outcome, Question
from trainer.evaluation.kinds.metrics import mean_and_stderr, perplexity_and_stderr, stop_tokens
from trainer.evaluation.prompts import Prompts
from trainer.evaluation.tasks.description import Completion
from trainer.evaluation.tasks.templates import Document, template
from trainer.inference.requests import Pair, Sampling

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring


class CompletionKind:
    """`acc`: the model would write the whole continuation; `acc_last_token`: its last token, after the others; `ppl`:
    by a continuation, e to the mean of -log p, with the standard error of that mean times ppl; `log_p`: the mean;
    `acc_no_stop_words`: the model would write it if no stop word might be its first token."""

    def __init__(self, name: str, cfg: Completion) -> None:
        self._name, self._stop_words = name, cfg.stop_words
        self._context = template(f"{name}: context", cfg.context)
        self._continuation = template(f"{name}: continuation", cfg.continuation)

    def demonstration(self, document: Document) -> str:
        return self._context(document) + self._continuation(document)

    def prepare(self, questions: Sequence[Question], prompts: Prompts, encoder: Encoder, n_ctx: int) -> Measure:
        pairs: list[Pair] = []
        for q in questions:
            context, continuation = self._context(q.document), self._continuation(q.document)

            def fits(prompt: str, context: str = context, continuation: str = continuation) -> bool:
                return sum(map(len, encoder.pair(prompt + context, continuation))) <= n_ctx + 1

            pairs.append(encoder.pair(prompts.before(q.number, fits) + context, continuation))
        banned = stop_tokens(encoder.tokenizer) if self._stop_words else None

        def measure(scoring: Scoring) -> Outcome:
            answers = scoring.likelihoods(self._name, pairs)
            cut = sum(answer.cut > 0 for answer in answers)
            samples = [self._sample(q, answer) for q, answer in zip(questions, answers, strict=True)]
            figures = _figures(answers)
            if banned is not None:
                right = self._filtered(pairs, banned, scoring)
                for sample, one in zip(samples, right, strict=True):
                    sample["right"]["acc_no_stop_words"] = one
                mean, stderr = mean_and_stderr(right)
                figures |= {"acc_no_stop_words": mean, "acc_no_stop_words_stderr": stderr}
            return Outcome(len(samples), figures, samples, {"contexts_cut": cut} if cut else {})

        return measure

    def _filtered(self, pairs: list[Pair], banned: tuple[int, ...], scoring: Scoring) -> list[float]:
        """1.0 for each continuation whose first token is the likeliest but for those that are banned, and whose others
        are the likeliest ones."""
        what, n_ctx = f"{self._name}, without stop words", scoring.model.cfg.n_ctx
        how = Writing(Sampling(temperature=0.0, banned=banned), tokens=1, stop=(), seed=0)
        contexts = [context[-max(1, n_ctx - len(ids)) :] for context, ids in pairs]  # cut to where a token has room
        first = scoring.continuations(what, contexts, how, None)
        others = [(context + ids[:1], ids[1:]) for context, ids in pairs if len(ids) > 1]
        rest = iter(scoring.likelihoods(what, others))
        goes_on = [len(ids) == 1 or next(rest).greedy for _, ids in pairs]
        return [float(new == ids[:1] and on) for new, (_, ids), on in zip(first, pairs, goes_on, strict=True)]

    def _sample(self, q: Question, answer: Likelihood) -> dict[str, Any]:
        return {
            "document": q.number,
            "context": self._context(q.document),
            "continuation": self._continuation(q.document),
            "log_p": answer.log_p,
            "tokens": answer.tokens,
            "right": {"acc": float(answer.greedy), "acc_last_token": float(answer.last)},
        }


def _figures(answers: list[Likelihood]) -> dict[str, float]:
    acc, acc_stderr = mean_and_stderr([float(a.greedy) for a in answers])
    last, last_stderr = mean_and_stderr([float(a.last) for a in answers])
    log_p, log_p_stderr = mean_and_stderr([a.log_p for a in answers])
    ppl, ppl_stderr = perplexity_and_stderr([a.log_p for a in answers], [1] * len(answers))
    return {
        "acc": acc,
        "acc_stderr": acc_stderr,
        "acc_last_token": last,
        "acc_last_token_stderr": last_stderr,
        "ppl": ppl,
        "ppl_stderr": ppl_stderr,
        "log_p": log_p,
        "log_p_stderr": log_p_stderr,
    }

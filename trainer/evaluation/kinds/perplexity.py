"""Perplexity of texts, by a unit of the original text: the divisor is part of the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from conf.errors import UserError
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.kinds import detokenise
from trainer.evaluation.kinds.detokenise import words_and_line_ends
from trainer.evaluation.kinds.kind import Measure, Outcome, Question
from trainer.evaluation.kinds.metrics import perplexity_and_stderr
from trainer.evaluation.prompts import Prompts
from trainer.evaluation.tasks.description import Perplexity
from trainer.evaluation.tasks.templates import Document, template

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring


class PerplexityKind:
    """`ppl`: e to the mean of -log p by unit; `bits`: the same mean in bits; `ppl_per_token`, `bits_per_byte`: by a
    token of the model's vocabulary and by a byte of the text that the model saw."""

    def __init__(self, name: str, cfg: Perplexity) -> None:
        self.cfg = cfg
        self._name = name
        self._text = template(f"{name}: text", cfg.text)
        if cfg.detokeniser is not None and cfg.detokeniser not in detokenise.DETOKENISERS:
            names = ", ".join(sorted(detokenise.DETOKENISERS))
            raise UserError(f"task {name}: detokeniser={cfg.detokeniser}: give one of {names}, or null")

    def demonstration(self, document: Document) -> str:
        return self._text(document)

    def prepare(self, questions: Sequence[Question], prompts: Prompts, encoder: Encoder, n_ctx: int) -> Measure:
        originals = [self._text(q.document) for q in questions]
        make = detokenise.DETOKENISERS[self.cfg.detokeniser].detokenise if self.cfg.detokeniser else str
        texts = [make(text) for text in originals]
        ids = [encoder.text(text) for text in texts]
        tokens = [max(0, len(some) - 1) for some in ids]  # the first is context alone
        units = [self._units(text, n) for text, n in zip(originals, tokens, strict=True)]
        if not sum(units) or not sum(tokens):
            raise UserError(f"task {self._name}: no {self.cfg.unit} in its texts: give documents that hold some")
        size = sum(len(text.encode()) for text in texts)
        rule = self._rule(sum(units), encoder, n_ctx)

        def measure(scoring: Scoring) -> Outcome:
            log_p = [answer.log_p for answer in scoring.texts(self._name, ids, self.cfg.context)]
            samples = [
                {"document": q.number, "log_p": nats, "tokens": n_tokens, self.cfg.unit: n}
                for q, nats, n_tokens, n in zip(questions, log_p, tokens, units, strict=True)
            ]
            ppl, ppl_stderr = perplexity_and_stderr(log_p, units)
            bits = -sum(log_p) / math.log(2)
            figures = {
                "ppl": ppl,
                "ppl_stderr": ppl_stderr,
                "bits": bits / sum(units),
                "ppl_per_token": perplexity_and_stderr(log_p, tokens)[0],
                "bits_per_byte": bits / size,
            }
            return Outcome(len(questions), figures, samples, dict(rule))

        return measure

    def _units(self, text: str, tokens: int) -> int:
        """The divisor of one original text; `tokens`: those of the vocabulary that were scored."""
        words = words_and_line_ends(text) if self.cfg.ends_of_lines else len(text.split())
        return {"words": words, "tokens": tokens, "bytes": len(text.encode()), "characters": len(text)}[self.cfg.unit]

    def _rule(self, units: int, encoder: Encoder, n_ctx: int) -> dict[str, object]:
        seen = f"windows of {n_ctx} tokens, each of which sees at least {self.cfg.context} before its first"
        start = "the first after the end-of-text token" if encoder.start else "the first token is not scored"
        return {"divisor": f"{units} {self.cfg.unit}", "context": f"{seen}; {start}"}

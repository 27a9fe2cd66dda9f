"""Our model as lm-evaluation-harness asks it: log-probabilities of token ids, and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from trainer.evaluation.answers import Writing
from trainer.evaluation.encoder import Encoder
from trainer.inference.requests import Sampling

if TYPE_CHECKING:
    from trainer.evaluation.scoring import Scoring

MAX_NEW = 256  # tokens, where a task does not say


def model_class() -> type:
    """Our model as the harness's `TemplateLM`, made of (Scoring, Encoder). Each rank is asked everything: `Scoring`
    divides the work."""
    from lm_eval.api.model import TemplateLM

    class GradusLM(TemplateLM):
        """Log-probabilities and texts of one of our models."""

        def __init__(self, scoring: Scoring, encoder: Encoder) -> None:
            super().__init__()
            self._scoring, self._encoder = scoring, encoder

        @property
        def eot_token_id(self) -> int:
            if not self._encoder.start:
                raise UserError(
                    "this task asks for the probability of a text from its start, which needs a vocabulary with an "
                    "end-of-text token: take another task"
                )
            return self._encoder.start[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return self._encoder.tokenizer.encode(string)  # text never becomes a special token

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return [(a.log_p, a.greedy) for a in self._scoring.likelihoods("lm_eval", pairs)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [[self.eot_token_id, *self._encoder.tokenizer.encode(r.args[0])] for r in requests]
            return [a.log_p for a in self._scoring.texts("lm_eval", texts)]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            by_rule: dict[str, list[int]] = {}
            for i, r in enumerate(requests):
                by_rule.setdefault(json.dumps(r.args[1], sort_keys=True), []).append(i)
            texts: dict[int, str] = {}
            for rule, some in by_rule.items():
                contexts = [requests[i].args[0] for i in some]
                written = _written(self._scoring, self._encoder, contexts, json.loads(rule))
                texts |= dict(zip(some, written, strict=True))
            return [texts[i] for i in range(len(requests))]

    return GradusLM


def _written(scoring: Scoring, encoder: Encoder, contexts: Sequence[str], rule: dict[str, Any]) -> list[str]:
    """The texts that continue `contexts` by the harness's settings of a generation."""
    until = rule.get("until", [])
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    tokens = int(rule.get("max_gen_toks", MAX_NEW))
    room = scoring.model.cfg.n_ctx - tokens
    if room < 1:
        raise UserError(
            f"a task writes up to {tokens} tokens, which leave no room for a prompt in the model's "
            f"n_ctx={scoring.model.cfg.n_ctx}: give max_new_tokens=, fewer"
        )
    drawn = rule.get("do_sample", False) and float(rule.get("temperature", 1.0)) > 0
    sampling = Sampling(float(rule.get("temperature", 1.0)) if drawn else 0.0, rule.get("top_k"), rule.get("top_p"))
    prompts = [encoder.prompt(text, room) for text in contexts]
    eot = encoder.tokenizer.eot_id
    how = Writing(sampling, tokens, stop, seed=0)
    out = []
    for ids in scoring.continuations("lm_eval", prompts, how, eot):
        text = encoder.tokenizer.decode([i for i in ids if i != eot])
        for mark in stop:
            text = text.split(mark)[0]
        out.append(text)
    return out

"""A model's answers to the requests of an evaluation, and the rules that it writes texts by."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.inference.requests import Sampling


@dataclass(frozen=True)
class Likelihood:
    """The probability of a continuation."""

    log_p: float  # nats
    tokens: int
    greedy: bool  # each token is the likeliest one: the model would write it
    last: bool  # the last token is
    cut: int  # tokens of the context that n_ctx left no room for


@dataclass(frozen=True)
class Writing:
    """The rules by which a model continues a text: by `sampling`, up to `tokens` tokens or before a text of `stop`."""

    sampling: Sampling
    tokens: int
    stop: tuple[str, ...]
    seed: int
    beams: int = 1  # more: beam search instead of `sampling`
    length_penalty: float = 0.6

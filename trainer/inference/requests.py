"""The rules of what a model is asked for; a plan of an evaluation is made of them where torch is not installed."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[list[int], list[int]]  # context, continuation


@dataclass(frozen=True)
class Sampling:
    """The rule by which the next token is drawn; `temperature` 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    banned: tuple[int, ...] = ()  # ids that are never drawn

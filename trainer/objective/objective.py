"""The protocol of an objective: weighted terms, each a sum over a micro batch divided by a global count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Objective(Protocol):
    """Terms k = 0, 1, ...; a step minimises the sum over k of weight_k * sum_k / count_k.

    sum_k and count_k run over all data-parallel ranks and micro batches of the step. Micro batches of one step may be
    of different kinds: the type of a batch, a NamedTuple of tensors, is its kind. The kind of a micro step is a
    function of (position, micro step), the same on all ranks.
    """

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms, as they are logged."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each term; 0: a figure that is logged and not minimised, such as an accuracy."""

    def counts(self, batch: Any) -> list[float]:
        """Additions of this micro batch to the terms' counts, from labels on the host alone, without the model."""

    def sums(self, module: Any, batch: Any) -> Tensor:
        """Each term's sum over this micro batch, fp32 [k], equal on all tp ranks, for autograd.

        `batch` lies on the device. A term of which nothing counts here is 0, with a finite gradient. Weights are used
        by calling modules, never by reading `.weight`: under ZeRO-3 a weight exists only during its module's forward.
        Which modules a kind uses must not depend on the data.
        """


def weighted_loss(objective: Objective, sums: Sequence[float], counts: Sequence[float]) -> float:
    """The loss from global sums and counts; terms that count nothing add 0; if none counts, it is NaN."""
    terms = zip(objective.weights, sums, counts, strict=True)
    means = [weight * (total / count) for weight, total, count in terms if count != 0]
    return sum(means[1:], means[0]) if means else math.nan


def figures(objective: Objective, means: Sequence[float]) -> dict[str, float]:
    """The means of several terms as metrics: `loss/NAME`, or NAME for one of weight 0; {} for a single term."""
    named = zip(objective.terms, objective.weights, means, strict=True)
    return {f"loss/{name}" if weight else name: x for name, weight, x in named} if len(objective.terms) > 1 else {}

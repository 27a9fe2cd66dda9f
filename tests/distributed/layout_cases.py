"""The layouts that tests train, and the combinations that are refused: together every pair of settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config.optim import Kind
from trainer.config.parallel import Offload, Recompute


@dataclass(frozen=True)
class Case:
    tp: int = 1
    sequence_parallel: bool = False
    zero: int = 1
    recompute: str = "none"
    offload: str = "none"
    kind: str = "adamw"
    accumulate: bool = False


AXES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "sequence_parallel": (False, True),
    "zero": (1, 2, 3),
    "recompute": tuple(r.value for r in Recompute),
    "offload": tuple(o.value for o in Offload),
    "kind": tuple(k.value for k in Kind),
    "accumulate": (False, True),
}

REFUSED: dict[str, dict[str, Any]] = {  # what the refusal says -> the settings that it is said of
    "there is nothing to split": {"tp": 1, "sequence_parallel": True},
    "each rank's part of a matrix": {"kind": "muon", "tp": (2, 4)},
    "its matrix products would run on the CPU": {"kind": "muon", "offload": "cpu"},
}


def trained() -> list[Case]:
    """Each on 4 ranks, dp = 4 / tp; test_layouts.py compares it with one plain process."""
    again = [r for r in AXES["recompute"] if r != "none"]
    return [
        Case(tp=4, accumulate=True),
        Case(tp=4, sequence_parallel=True, zero=3, offload="cpu", accumulate=True),
        Case(tp=2, sequence_parallel=True, zero=2, accumulate=True),
        Case(zero=2, kind="muon"),
        Case(zero=3, kind="muon", accumulate=True),
        *(Case(tp=4, sequence_parallel=True, zero=2, recompute=r, offload="cpu") for r in again),
        *(Case(tp=2, sequence_parallel=True, zero=1, recompute=r, offload="cpu", accumulate=True) for r in again),
        *(Case(tp=2, zero=3, recompute=r) for r in again),
        *(Case(zero=3, recompute=r, offload="cpu", accumulate=True) for r in again),
        *(Case(zero=1, recompute=r, kind="muon") for r in again),
    ]


def refusal(case: Case) -> str | None:
    """What is said of this combination; None where it is trained."""
    for said, settings in REFUSED.items():
        if all(getattr(case, k) in (v if isinstance(v, tuple) else (v,)) for k, v in settings.items()):
            return said
    return None


def every_case() -> Iterator[Case]:
    for values in itertools.product(*AXES.values()):
        yield Case(*values)


def pairs(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Every two settings of a case."""
    return set(itertools.combinations(asdict(case).items(), 2))

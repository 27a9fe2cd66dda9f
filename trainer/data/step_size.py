"""The size of a step, by which schedules, speed and the guard compare steps. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepSize:
    """The size of one step over all ranks.

    `fixed`: every example is a window of `n_ctx` tokens, and work is counted in tokens; otherwise in examples.
    `done`: the work of all steps before. `mixture`: the shares that examples are drawn by.
    """

    examples: int
    n_ctx: int
    done: int
    fixed: bool = True
    mixture: Mapping[str, int] = field(default_factory=dict)

    @property
    def work(self) -> int:
        return self.examples * self.n_ctx if self.fixed else self.examples

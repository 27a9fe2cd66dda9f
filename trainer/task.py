"""The task of a run: what is minimised, and from which data. The trainer knows no more of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from trainer.config.model import ModelConfig
from trainer.config.parallel import Recompute
from trainer.data.feed import MakeFeed
from trainer.distributed.mesh import Mesh
from trainer.engine.engine import Engine
from trainer.model.gpt import GPT
from trainer.objective.objective import Objective
from trainer.samples import Samples


class MakeModel(Protocol):
    """Makes the module that is trained: a GPT, perhaps with a head, still without weights."""

    def __call__(self, cfg: ModelConfig, mesh: Mesh, *, sequence_parallel: bool, recompute: Recompute) -> GPT: ...


class Scores(Protocol):
    """Figures of the model while it trains, beside its loss."""

    @property
    def every(self) -> int:
        """The steps between two times; 0 = only at the end."""

    def find(self, model: GPT, loss: float, on_progress: Callable[[], None]) -> tuple[dict[str, float], str]:
        """Metrics by name, and a line of them. Collective. `loss`: the newest; `on_progress` is called now and then."""


Finish = Callable[[Engine, Callable[[], None]], Mapping[str, float]]
"""Changes weights and returns metrics by name. Collective. Its second argument is to be called now and then."""


@dataclass(frozen=True)
class Task:
    """The kind of a run, of which the trainer knows no more: what is minimised, and from which data.

    `fetch_s`: seconds that a step may wait for data that is not local. `tokenizer`: its tokenizer.json, which every
    checkpoint gets.
    """

    objective: Objective
    feed: MakeFeed
    model: MakeModel = GPT
    eval_every: int = 0  # steps between validations; 0 = only at the end
    patience: int = 0  # validations in a row without a new lowest loss after which the run ends; 0 = any number
    fetch_s: float = 0.0
    tokenizer: bytes | None = None
    eot_id: int | None = None  # the end-of-text token
    samples: Samples | None = None  # to draw at validations
    scores: Scores | None = None  # to find each `scores.every` steps, and at the end
    finish: Finish = lambda *_: {}  # what changes the weights once more, before the last save

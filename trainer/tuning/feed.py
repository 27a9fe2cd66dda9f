"""The feed of a checked tuning: its examples, and those that are held out, as micro batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from data_pipeline.examples.templates import Marked
from trainer.config.tuning.common import TuneConfig
from trainer.data.example_feed import Collate, ExampleFeed, HeldOut, Rows
from trainer.data.feed import MakeFeed
from trainer.engine.engine import Engine
from trainer.tuning.check import Checked

C = TypeVar("C", bound=TuneConfig)
T = TypeVar("T")
R = TypeVar("R", bound=Marked)


def make_feed(
    checked: Checked[C, T, R],
    collate_of: Callable[[Sequence[T]], Collate],
    name: str,
    *,
    held_out: Rows | None = None,
    fixed: bool = False,
) -> MakeFeed:
    """Makes the feed of a new run, and of one that goes on.

    Args:
        collate_of: what makes micro batches of some examples.
        name: of the examples, in the plural.
        held_out: rows of the held-out examples; None: each makes a row.
        fixed: every row has n_ctx tokens.
    """
    validation, number = None, len(checked.held_out)
    if number:
        rows = [[i] for i in range(number)] if held_out is None else held_out
        validation = HeldOut(rows, collate_of(checked.held_out), f"{number:,} {name}")

    def make(engine: Engine, state: Mapping[str, Any]) -> ExampleFeed:
        return ExampleFeed(
            checked.order,
            collate_of(checked.train),
            validation,
            engine.mesh,
            step=state.get("step", 0),
            state=state.get("data", {}),
            about=checked.about,
            micro_batch_size=int(checked.cfg.micro_batch_size),
            n_ctx=checked.cfg.model.n_ctx,
            fixed=fixed,
        )

    return make

"""The feed of tuning: rows of examples that are in memory, in the order of `data_pipeline.examples.rows`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from conf.errors import UserError
from data_pipeline.examples.rows import RowOrder
from data_pipeline.order.plan import Plan
from trainer.data.feed import AnyBatch, ValidationSet
from trainer.data.step_size import StepSize
from trainer.distributed.mesh import Mesh

Rows = Sequence[Sequence[int]]
Collate = Callable[[Rows], AnyBatch]
"""The micro batch of rows, each the numbers of the examples in it; one without any has nothing to learn."""


class HeldOut(NamedTuple):
    """The examples to validate with."""

    rows: Rows
    collate: Collate
    measures: str  # in words that change with the examples


class ExampleFeed:
    """Micro batches of one rank from `step` on: an implementation of `feed.Feed`.

    Args:
        order, collate: of the examples to train on; `order.rows_per_step` is a multiple of dp * micro_batch_size.
        about: what a run that goes on must have again, for its checkpoints.
        state: a checkpoint's data state, {} for a new run.
        fixed: every row has n_ctx tokens.
    """

    plan: Plan | None = None

    def __init__(
        self,
        order: RowOrder,
        collate: Collate,
        held_out: HeldOut | None,
        mesh: Mesh,
        *,
        step: int,
        state: Mapping[str, Any],
        about: Mapping[str, Any],
        micro_batch_size: int,
        n_ctx: int,
        fixed: bool,
    ) -> None:
        self._order = order
        self._collate = collate
        self._held_out = held_out
        self._mesh = mesh
        self._about = dict(about)
        self._starts = [(int(first), int(position)) for first, position in state.get("starts", [(0, 0)])]
        self._micro_batch_size = micro_batch_size
        self._n_ctx = n_ctx
        self._fixed = fixed
        self._step = step  # that `next` gives next
        self._crc32 = 0

    def next(self) -> tuple[Sequence[AnyBatch], UserError | None]:
        share = self._order.rows_per_step // self._mesh.dp
        first = self.position(self._step) + self._mesh.dp_rank * share
        rows = [self._order.members(position) for position in range(first, first + share)]
        batches = [_pinned(self._collate(part), self._mesh) for part in _parts(rows, self._micro_batch_size)]
        self._crc32 = 0
        for batch in batches:
            if (tokens := batch[0]) is not None:
                self._crc32 = zlib.crc32(tokens.numpy().data, self._crc32)
        self._step += 1
        return batches, None

    def position(self, step: int) -> int:
        start, position = next(pair for pair in reversed(self._starts) if pair[0] <= step)
        return position + (step - start) * self._order.rows_per_step

    def size(self, step: int) -> StepSize:
        rows = self._order.rows_per_step
        return StepSize(rows, self._n_ctx, step * rows * (self._n_ctx if self._fixed else 1), fixed=self._fixed)

    def may_save(self, step: int) -> bool:
        return True

    def row(self, step: int) -> dict[str, float]:
        return {
            "data/epoch": self._order.epoch(self.position(step)),
            "data/position": self.position(step - 1),  # of the step's first row
            "data/crc32": self._crc32,  # of the tokens that this rank was fed
        }

    def validation(self, step: int) -> Sequence[ValidationSet]:
        if self._held_out is None:
            return []
        rows, collate, measures = self._held_out
        batches = shares(rows, collate, self._mesh, self._micro_batch_size)
        return [ValidationSet("held_out", 1.0, ((batch, None) for batch in batches), measures)]

    def retire(self, error: UserError | None) -> list[str]:
        raise error or UserError("another rank has no examples and says why")

    def jump(self, step: int, end: int) -> dict[str, Any]:
        kept = [pair for pair in self._starts if pair[0] < step]
        return {**self._about, "starts": [*kept, (step, self.position(end))]}

    def state(self, step: int) -> dict[str, Any]:
        return {**self._about, "starts": [pair for pair in self._starts if pair[0] <= step]}

    def summary(self) -> list[str]:
        rows, steps = self._order.rows_per_step, self._order.start(1) // self._order.rows_per_step
        held_out = f", {self._held_out.measures} held out" if self._held_out else ", none held out"
        return [f"examples: an epoch is {steps:,} steps of {rows:,}{held_out}"]

    def close(self) -> None:
        """Nothing is open."""


def shares(rows: Rows, collate: Collate, mesh: Mesh, size: int) -> Iterator[AnyBatch]:
    """This rank's micro batches of `rows`, as many on each: what is missing are rows without an example."""
    for start in range(0, len(rows), mesh.dp * size):
        first = start + mesh.dp_rank * size
        own = list(rows[first : first + size])
        yield _pinned(collate([*own, *([[]] * (size - len(own)))]), mesh)


def _pinned(batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    if mesh.device.type != "cuda":
        return batch
    kind: Any = type(batch)
    pinned: AnyBatch = kind(*(t if t is None else t.pin_memory() for t in batch))
    return pinned


def _parts(rows: Rows, size: int) -> Iterator[Rows]:
    source = iter(rows)
    while part := list(islice(source, size)):
        yield part

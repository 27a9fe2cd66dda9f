"""The protocol of a feed: whatever gives a run its batches, from shards, from examples or from roll-outs.

The loop, the guard and a rollback know a feed by this protocol alone. The order and the draws of a feed are functions
of (seed, position). A position counts what was drawn, not steps: a rollback repeats steps and goes on behind the
positions that were bad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from conf.errors import TransientError, UserError, may_pass
from data_pipeline.order.plan import Plan
from trainer.data.step_size import StepSize
from trainer.distributed.mesh import Mesh

if TYPE_CHECKING:
    from trainer.engine.engine import Engine  # imports DeepSpeed

AnyBatch = tuple[Tensor | None, ...]


class ValidationSet(NamedTuple):
    """One source's validation batches, as many on each rank; an empty batch comes with the reason for it."""

    name: str
    weight: float  # of its loss in the mean over all sets of its kind
    batches: Iterator[tuple[AnyBatch, UserError | None]]
    measures: str = ""  # in words that change with what its loss measures
    trained: bool = False  # it is training data: its loss stands beside the validation's


class Feed(Protocol):
    """Batches of one rank, step after step. Collective calls are made on the main thread, by all ranks alike.

    Steps count updates, so that step N is the one after N updates. What a method says of a step holds for steps since
    the run's last rollback.
    """

    @property
    def plan(self) -> Plan | None:
        """The plan of windows, for the mixture plot; None if nothing is planned."""

    def next(self) -> tuple[Sequence[AnyBatch], UserError | None]:
        """The micro batches of the next step. If they cannot be read: as many placeholders, and the reason.

        An error is returned, not raised, so that this rank takes part in the step's collectives; all ranks learn of it
        by the vote, and then call `retire`.
        """

    def position(self, step: int) -> int:
        """The first position that `step` draws."""

    def size(self, step: int) -> StepSize:
        """The size of a step."""

    def may_save(self, step: int) -> bool:
        """Return True if a checkpoint may be made after `step` updates: a run can go on from there.

        False inside an iteration whose steps share one roll-out.
        """

    def row(self, step: int) -> dict[str, float]:
        """Metrics of the data after `step` updates, for the journal."""

    def validation(self, step: int) -> Sequence[ValidationSet]:
        """The sets to validate with, as they count after `step` updates."""

    def retire(self, error: UserError | None) -> list[str]:
        """Go on without what cannot be read, from the step that `next` gave last. Collective.

        `error`: this rank's, from `next`. Returns what is lost, in words.

        Raises:
            UserError: on every rank, if the run cannot go on without it.
        """

    def jump(self, step: int, end: int) -> dict[str, Any]:
        """The data state of a run that is at `step` again and goes on behind all that the steps before `end` drew.

        Changes nothing. Raises UserError if too little data is left.
        """

    def state(self, step: int) -> dict[str, Any]:
        """The data state after `step` updates, JSON, for the checkpoint: a feed made of it continues this one."""

    def summary(self) -> list[str]:
        """Lines on the data for the start of a run."""

    def close(self) -> None:
        """End threads and files. May be called twice."""


MakeFeed = Callable[["Engine", Mapping[str, Any]], Feed]
"""Makes a feed from the engine, which roll-outs sample with, and a checkpoint's state; {} for a new run."""


def agree(mesh: Mesh, error: UserError | None, answer: Any = None) -> list[Any]:
    """`answer` of every rank. Collective.

    Raises:
        UserError: on every rank, if any has an error: its own, or that another has one. TransientError if all are.
    """
    own = error if mesh.tp_rank == 0 else None  # others of a tp group repeat the error of the rank that reads
    replies: list[Any] = [None] * mesh.world.world_size
    dist.all_gather_object(replies, (own is not None, own is not None and may_pass(own), answer))
    failed = [transient for has_error, transient, _ in replies if has_error]
    if failed:
        kind = TransientError if all(failed) else UserError
        if error is not None and isinstance(error, kind):
            raise error
        # a reader's error reaches the others of its group as text, without its kind
        raise kind(str(error) if error else "another rank could not read its data and says why") from None
    return [answer for *_, answer in replies]

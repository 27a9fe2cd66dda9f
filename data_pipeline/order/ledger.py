"""The ledger of a run: one segment for the start and one for each event since. Standard library only.

Position is not step: a rollback jumps over windows, a lost shard is retired, a stage changes the mixture, the
window's length or the batch. These few events are the ledger. Each checkpoint's state.json holds it; with the seed and
the shards' lengths it gives the windows of any step of the run (`plan.Plan`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from conf.errors import UserError
from data_pipeline.files import from_json


@dataclass(frozen=True)
class Segment:
    """From `step` on, which begins at `position`, each step takes `windows_per_step` windows of n_ctx + 1 tokens.

    `weights` are the sources' shares in integers, 0 for one that is not drawn; `lost` the numbers of lost shards.
    """

    step: int
    position: int
    windows_per_step: int
    n_ctx: int
    weights: Mapping[str, int]
    lost: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.n_ctx

    def position_at(self, step: int) -> int:
        return self.position + (step - self.step) * self.windows_per_step


@dataclass(frozen=True)
class Ledger:
    """The segments of a run, in order.

    Raises:
        UserError: segments that do not start at step 0, go back, take no windows, or find a shard again.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments or self.segments[0].step != 0 or self.segments[0].position < 0:
            raise UserError(f"ledger {self.segments}: the first segment starts at step 0 and a position of 0 or more")
        for s in self.segments:
            if s.windows_per_step < 1 or s.n_ctx < 1:
                raise UserError(f"ledger {s}: each step takes at least 1 window of at least 1 token")
            if min(s.weights.values(), default=0) < 0 or not any(s.weights.values()):
                raise UserError(f"ledger {s}: weights are 0 or more, and one is more")
        for a, b in pairwise(self.segments):
            if b.step < a.step or b.position < a.position_at(b.step):
                raise UserError(
                    f"ledger: step {b.step} at position {b.position} goes back: the step before it ends at position "
                    f"{a.position_at(b.step)} (segment from step {a.step}); windows are never served again"
                )
            if any(not set(shards) <= set(b.lost.get(name, ())) for name, shards in a.lost.items()):
                raise UserError(f"ledger: step {b.step} has lost {dict(b.lost)}, but {dict(a.lost)} were lost before")

    @classmethod
    def start(cls, windows_per_step: int, n_ctx: int, weights: Mapping[str, int]) -> Ledger:
        return cls((Segment(0, 0, windows_per_step, n_ctx, dict(weights)),))

    def then(self, step: int, **changes: Any) -> Ledger:
        """This ledger with one more event at `step`; fields that are not in `changes` stay as they are.

        An event that changes nothing is not added. Planned events from `step` on are dropped. Raises UserError for an
        event that goes back.
        """
        kept = tuple(s for s in self.segments if s.step < step) or self.segments[:1]
        last = kept[-1]
        new = replace(last, **{"step": step, "position": last.position_at(step), **changes})
        if new == replace(last, step=step, position=last.position_at(step)):
            return Ledger(kept)
        return Ledger((new,) if step == 0 else (*kept, new))

    def lose(self, step: int, name: str, shard: int) -> Ledger:
        """This ledger without a shard of a source from `step` on; planned events stay."""
        current = self.segment(step)
        first = replace(current, step=step, position=self.position(step))
        later = (first, *(s for s in self.segments if s.step > step))
        without = (replace(s, lost={**s.lost, name: tuple(sorted({*s.lost.get(name, ()), shard}))}) for s in later)
        return Ledger((*(s for s in self.segments if s.step <= step and (s is not current or s.step < step)), *without))

    def jump(self, step: int, end: int) -> Ledger:
        """This ledger with the run at `step` again, jumping over the windows of the steps from there to before `end`.

        Planned events from `step` on stay. The windows jumped over keep their place in the order: they are segments of
        no step, with the mixture and length that they were drawn in, after those of earlier jumps to this step; no
        earlier jump is to a later one. A shard lost by then stays lost.
        """
        first = replace(self.segment(step), step=step, position=self.position(step))
        over = (first, *(replace(s, step=step) for s in self.segments if step < s.step < end))
        return self._over(step, over, self.position(end))

    def jump_of(self, past: Ledger, step: int) -> Ledger:
        """This ledger with the jump that `past` has at `step`, if any: for a run that resumes at just that step."""
        *over, last = (s for s in past.segments if s.step == step or s is past.segment(step))
        return self._over(step, tuple(over), last.position) if over else self

    def _over(self, step: int, over: tuple[Segment, ...], position: int) -> Ledger:
        by = position - self.position(step)
        current = replace(self.segment(step), step=step, position=self.position(step))
        later = (current, *(s for s in self.segments if s.step > step))
        shifted = (replace(s, position=s.position + by, lost={**s.lost, **over[-1].lost}) for s in later)
        before = (s for s in self.segments if s.step < step or (s.step == step and s is not self.segment(step)))
        return Ledger((*before, *over, *shifted))

    def until(self, step: int) -> Ledger:
        """The events before `step`, without those planned from there on."""
        return Ledger(tuple(s for s in self.segments if s.step < step) or self.segments[:1])

    def segment(self, step: int) -> Segment:
        """The segment of `step`."""
        if step < 0:
            raise UserError(f"step={step}: steps count from 0")
        return self.segments[bisect_right(self.segments, step, key=lambda s: s.step) - 1]

    def position(self, step: int) -> int:
        """The first position of `step`."""
        return self.segment(step).position_at(step)

    def number_at(self, position: int) -> int:
        """The number of the segment of `position`; a position jumped over belongs to the one before."""
        return max(0, bisect_right(self.segments, position, key=lambda s: s.position) - 1)

    def step_of(self, position: int) -> int | None:
        """The step that takes `position`; None if an event jumped over it."""
        n = bisect_right(self.segments, position, key=lambda s: s.position) - 1
        if n < 0:
            return None
        segment = self.segments[n]
        step = segment.step + (position - segment.position) // segment.windows_per_step
        jumped = n + 1 < len(self.segments) and step >= self.segments[n + 1].step
        return None if jumped else step

    def tokens(self, step: int) -> int:
        """The number of tokens that the steps before `step` train on."""
        stops = [*(min(s.step, step) for s in self.segments[1:]), step]
        return sum(max(0, stop - s.step) * s.tokens_per_step for s, stop in zip(self.segments, stops, strict=True))

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(s) for s in self.segments]

    @classmethod
    def from_json(cls, body: Any) -> Ledger:
        """The ledger of a body that `to_json` made; raises UserError for any other."""
        return from_json(cls, {"segments": body}, "ledger", "resume from another checkpoint")

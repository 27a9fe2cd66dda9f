"""The guard: judges steps whose loss or gradient jumps, and says when the run rolls back. Standard library only.

`step.py` and the engine's gate keep the update of a bad step from being made.

A step is bad where its loss or gradient norm is not finite, or stands far above what the last accepted steps had: z =
(x - median) / scale of the loss and of the logarithm of the norm, where scale is 1.4826 x the median deviation from the
median (a normal distribution's standard deviation) and at least FLOOR. Only upwards: a fall is what training is for.

All ranks must judge alike: a step that some ranks take and others do not splits the model. They use two numbers and a
history of such numbers. Both come from all-reduces, so every rank of a group has exactly the same bits. With tensor
parallelism the loss is reduced in one group for each tp rank; its terms are the same there, and so is their sum as long
as the groups add in the same order. If they do not, or if a machine computes wrongly, `check` says so: each step's vote
carries the number of steps that each rank has skipped.

The history is small, and lies in every checkpoint: `recent`, at most `window` pairs; of the events all rollbacks and
the last EVENTS skipped steps; and how many were skipped in all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from conf.errors import TransientError, UserError
from trainer.config.health import GuardConfig
from trainer.data.step_size import StepSize

LOSS_FLOOR = 0.02  # nats: noise below is no spike, however flat the history
NORM_FLOOR = 0.2  # of log norm: with spike_z=12, a norm of 11 times the median at least
EVENTS = 100
NON_FINITE, LOSS_SPIKE, GRADIENT_SPIKE = "non-finite", "loss spike", "gradient spike"
SKIPPED, ROLLED_BACK = "skipped", "rolled back"
Event = dict[str, Any]


class Guard:
    """The history of a run's steps, and its judgement of the next one. `history`: from `to_json`, None for a new run.

    Raises:
        UserError: a history that `to_json` did not make.
    """

    def __init__(self, cfg: GuardConfig, history: Mapping[str, Any] | None = None) -> None:
        self.cfg = cfg
        self.recent = _recent(cfg, history)
        try:
            self.events: list[Event] = [dict(event) for event in (history or {}).get("events", [])]
            self.skipped = int((history or {}).get("skipped", 0))
            if any(type(e["step"]) is not int or e["did"] not in (SKIPPED, ROLLED_BACK) for e in self.events):
                raise ValueError("an event has no step, or did nothing")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise _damaged(e) from None

    def enter(self, now: StepSize, before: StepSize) -> None:
        """Before a step of size `now` is judged: forget the history if its losses compare badly with those `before`.

        This happens when the mixture or the length changes, or when the batch is less than half of the one before: a
        mean over fewer examples is noisier.
        """
        smaller = 2 * now.examples < before.examples
        if smaller or (now.n_ctx, now.mixture) != (before.n_ctx, before.mixture):
            self.recent.clear()

    def judge(self, loss: float, norm: float) -> str | None:
        """The reason why a step of this loss (nats) and global gradient norm is bad; None if it is good."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return NON_FINITE
        if not self.cfg.spike_z or len(self.recent) < self.cfg.min_steps:
            return None
        if robust_z(loss, [x for x, _ in self.recent], LOSS_FLOOR) > self.cfg.spike_z:
            return LOSS_SPIKE
        if robust_z(_log(norm), [_log(x) for _, x in self.recent], NORM_FLOOR) > self.cfg.spike_z:
            return GRADIENT_SPIKE
        return None

    def record(self, step: int, position: int, loss: float, norm: float) -> str | None:
        """Add a step, which drew from `position` on, to the history; returns the reason if it was skipped."""
        reason = self.judge(loss, norm)
        if reason is None:
            self.recent.append((loss, norm))
            return None
        numbers = {"loss": _finite(loss), "norm": _finite(norm)}
        self.skipped += 1
        self.events.append({"step": step, "position": position, **numbers, "why": reason, "did": SKIPPED})
        old = [e for e in self.events if e["did"] == SKIPPED][: -max(EVENTS, self.cfg.skips)]
        self.events = [e for e in self.events if not any(e is gone for gone in old)]
        return reason

    def must_roll_back(self, step: int) -> bool:
        """Return True if too many of the steps before `step` were bad."""
        return len(self._episode(step)) >= self.cfg.skips

    def first_bad(self, step: int) -> int:
        """The first bad step among the last ones before `step`, or `step` if there is none."""
        return min((e["step"] for e in self._episode(step)), default=step)

    @property
    def rollbacks(self) -> list[Event]:
        return [e for e in self.events if e["did"] == ROLLED_BACK]

    def refuse_another(self, step: int) -> None:
        """Raises UserError, a report, if the run has gone back as often as it may."""
        if len(self.rollbacks) < self.cfg.max_rollbacks:
            return
        events = "; ".join(explain(e) for e in [*self.rollbacks, *self._episode(step)])
        raise UserError(
            f"guard: {self.cfg.skips} bad steps among the last {self.cfg.within}, and the run has rolled back "
            f"{len(self.rollbacks)} times of guard.max_rollbacks={self.cfg.max_rollbacks}: {events}: give a lower "
            "optim.lr or a longer optim.schedule.warmup, or look at what the steps were fed (python -m "
            f"data_pipeline.order checkpoint=RUN steps={self.first_bad(step)}:{step}); then resume, with more "
            "guard.max_rollbacks"
        )

    def roll_back(self, history: Mapping[str, Any] | None, to: int, jumped: tuple[int, int]) -> None:
        """Record that the last event sends the run back to the checkpoint of step `to`, whose history this is."""
        self.recent = _recent(self.cfg, history)
        self.events.append({**self.events[-1], "did": ROLLED_BACK, "to": to, "jumped": list(jumped)})

    def check(self, skipped: float, ranks: int) -> None:
        """Raises TransientError if `skipped`, the sum over all ranks, shows that another rank decided otherwise."""
        if skipped != ranks * self.skipped:
            raise TransientError(
                f"the ranks have not skipped the same steps ({self.skipped} on this one, so {ranks * self.skipped} "
                f"over {ranks} ranks, but there are {skipped:.0f}): one rank computes other numbers than the "
                "rest; the last checkpoint was written before that"
            )

    def last_event(self) -> str:
        """The last event in words."""
        return explain(self.events[-1])

    def to_json(self) -> dict[str, Any]:
        return {"recent": [list(pair) for pair in self.recent], "events": self.events, "skipped": self.skipped}

    def _episode(self, step: int) -> list[Event]:
        """The bad steps among the last `within` before `step`, since the last rollback."""
        since = max((n for n, e in enumerate(self.events, 1) if e["did"] == ROLLED_BACK), default=0)
        return [e for e in self.events[since:] if e["step"] >= step - self.cfg.within]


def robust_z(x: float, history: Sequence[float], floor: float) -> float:
    """The distance of `x` above the median of the history, in robust standard deviations of at least `floor`."""
    middle = median(history)
    return (x - middle) / max(1.4826 * median(abs(h - middle) for h in history), floor)


def explain(event: Event) -> str:
    """An event in words."""
    loss, norm = ("not finite" if event[k] is None else f"{event[k]:.4g}" for k in ("loss", "norm"))
    text = f"step {event['step']} (windows from {event['position']}, {event['why']}, loss {loss}, norm {norm})"
    if event["did"] == SKIPPED:
        return f"{text} skipped"
    return f"{text} sent the run back to step {event['to']}, over windows {event['jumped'][0]} to {event['jumped'][1]}"


def _recent(cfg: GuardConfig, history: Mapping[str, Any] | None) -> deque[tuple[float, float]]:
    try:
        pairs = [(float(loss), float(norm)) for loss, norm in (history or {}).get("recent", [])]
    except (TypeError, ValueError, AttributeError) as e:
        raise _damaged(e) from None
    return deque(pairs, maxlen=cfg.window)


def _damaged(e: Exception) -> UserError:
    return UserError(f"the guard's history in the checkpoint is damaged ({e!r}): resume from another checkpoint")


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _finite(x: float) -> float | None:
    """None for inf and nan, which JSON does not have."""
    return x if math.isfinite(x) else None

"""The learning rate as a pure function of the run's step and tokens. Standard library only."""

from __future__ import annotations

import math

from conf.errors import UserError
from data_pipeline.order.ledger import Ledger
from trainer.config.optim import OptimConfig, ScheduleConfig, ScheduleKind, Unit


def lr_of(optim: OptimConfig, ledger: Ledger, *, step: int, max_steps: int) -> float:
    """The rate of the update after `step` updates of a run whose steps are the ledger's."""
    return lr_at(
        optim.schedule,
        optim.lr,
        step=step,
        max_steps=max_steps,
        tokens=ledger.tokens(step),
        step_tokens=ledger.segment(step).tokens_per_step,
        end_tokens=ledger.tokens(max_steps),
    )


def lr_at(
    schedule: ScheduleConfig, lr: float, *, step: int, max_steps: int, tokens: int, step_tokens: int, end_tokens: int
) -> float:
    """The rate of the update after `step` updates and `tokens` tokens; `lr` is the peak.

    `step_tokens`: of this update. `end_tokens`: of the run, when `max_steps` updates are made.

    The ramp is read at the update's end and the decay at its start, so that neither the first update nor the last
    is wasted on a rate of 0. From `end` on the rate is `floor` x peak.

    Raises:
        UserError: warm-up and cooldown that do not fit before `end`.
    """
    before, after, run_end = step, step + 1, max_steps
    if schedule.unit is Unit.tokens:
        before, after, run_end = tokens, tokens + step_tokens, end_tokens
    end = run_end if schedule.end is None else schedule.end
    if schedule.warmup + schedule.cooldown > end:
        raise UserError(
            f"optim.schedule: warmup={schedule.warmup} + cooldown={schedule.cooldown} is longer than end={end} "
            f"{schedule.unit.value}: give a shorter warmup or cooldown, or a later end (max_steps={max_steps})"
        )
    ramp = min(1.0, after / schedule.warmup) if schedule.warmup else 1.0
    decay_from = end - schedule.cooldown if schedule.kind is ScheduleKind.wsd else schedule.warmup
    if before < decay_from or schedule.kind is ScheduleKind.constant:
        return lr * ramp
    progress = (before - decay_from) / (end - decay_from) if before < end else 1.0
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind is ScheduleKind.cosine else 1 - progress
    return lr * ramp * (schedule.floor + (1 - schedule.floor) * left)

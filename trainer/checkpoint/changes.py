"""The changes that a start makes to the run that it resumes: its config, key by key, and the next learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.frozen import by_key, peek, thaw
from trainer.config.optim import OptimConfig, Unit
from trainer.data.feed import Feed
from trainer.engine.schedule import lr_at

OF_A_START = ("resume", "resume_step", "take_over", "profile")  # they say how to start, nothing of the run


def changed_values(then: Path, now: Path) -> dict[str, str]:
    """The keys whose values differ between two frozen configs, each with `old -> new`; {} if one cannot be read.

    A key that only one of the two has is of another version or another kind of run: its other value is None.
    """
    try:
        old, new = by_key(peek(then)), by_key(peek(now))
    except UserError:
        return {}
    return {
        key: f"{old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in OF_A_START
    }


def changed_lines(
    schema: type[Any], optim: OptimConfig, max_steps: int, feed: Feed, step: int, then: Path, now: Path
) -> list[str]:
    """Lines for the start of a run that goes on after `step` steps: each changed value, and what follows for the rate.

    `then`, `now`: the frozen configs of the checkpoint and of this start, of dataclass `schema`.
    """
    changed = changed_values(then, now)
    if not changed:
        return []
    lines = [f"changed: {key} {change}" for key, change in changed.items()]
    if step < max_steps:
        ours = _rate(optim, max_steps, feed, step)
        try:
            old = thaw(then, schema)
            theirs = _rate(old.optim, old.max_steps, feed, step)
        except UserError:  # of another version
            return lines
        recounted = optim.schedule.unit is Unit.tokens and any(k.startswith(("tokens_", "batch_")) for k in changed)
        if theirs != ours and not recounted:
            lines.append(f"the learning rate of step {step + 1} is {ours:.2e}; unchanged it would be {theirs:.2e}")
    return lines


def _rate(optim: OptimConfig, max_steps: int, feed: Feed, step: int) -> float:
    size = feed.size(step)
    return lr_at(
        optim.schedule,
        optim.lr,
        step=step,
        max_steps=max_steps,
        tokens=size.done,
        step_tokens=size.work,
        end_tokens=feed.size(max_steps).done,
    )

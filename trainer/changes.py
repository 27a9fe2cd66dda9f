"""What a start changes of the run that it resumes: the config, key by key, and the learning rate of its next step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.frozen import peek, thaw
from trainer.config.optim import Unit
from trainer.config.train import TrainConfig
from trainer.data.feed import Feed
from trainer.engine.schedule import lr_at

OF_A_START = ("resume", "take_over")  # they say how to start, nothing of the run


def changed_values(then: Path, now: Path) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ between two frozen configs, each with (old, new); {} if one cannot be read.

    A key that only one of the two has is of another version or another kind of run: its other value is None.
    """
    try:
        old, new = dict(_flat(peek(then))), dict(_flat(peek(now)))
    except UserError:
        return {}
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in OF_A_START
    }


def changed_lines(cfg: TrainConfig, feed: Feed, step: int, then: Path, now: Path) -> list[str]:
    """Lines for the start of a run that goes on after `step` steps: each changed value, and what follows for the rate.

    `then`, `now`: the frozen configs of the checkpoint and of this start.
    """
    changed = changed_values(then, now)
    if not changed:
        return []
    lines = [f"changed: {key} {old} -> {new}" for key, (old, new) in changed.items()]
    if step < cfg.max_steps:
        ours = _rate(cfg, feed, step)
        try:
            theirs = _rate(thaw(then, type(cfg)), feed, step)
        except UserError:  # of another version
            return lines
        recounted = cfg.optim.schedule.unit is Unit.tokens and any(k.startswith(("tokens_", "batch_")) for k in changed)
        if theirs != ours and not recounted:
            lines.append(f"the learning rate of step {step + 1} is {ours:.2e}; unchanged it would be {theirs:.2e}")
    return lines


def _rate(cfg: TrainConfig, feed: Feed, step: int) -> float:
    size = feed.size(step)
    return lr_at(
        cfg.optim.schedule,
        cfg.optim.lr,
        step=step,
        max_steps=cfg.max_steps,
        tokens=size.done,
        step_tokens=size.work,
        end_tokens=feed.size(cfg.max_steps).done,
    )


def _flat(body: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in body.items():
        name = f"{above}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found

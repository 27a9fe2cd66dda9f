"""The learning rate: shape, ends and units."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from conf.errors import UserError
from trainer.config.optim import ScheduleConfig, ScheduleKind, Unit
from trainer.engine.schedule import lr_at

PEAK = 2e-3


def curve(schedule: ScheduleConfig, max_steps: int = 100, tokens_per_step: int = 10) -> list[float]:
    return [
        lr_at(
            schedule,
            PEAK,
            step=s,
            tokens=s * tokens_per_step,
            max_steps=max_steps,
            step_tokens=tokens_per_step,
            end_tokens=max_steps * tokens_per_step,
        )
        for s in range(max_steps)
    ]


@pytest.mark.parametrize("kind", [ScheduleKind.cosine, ScheduleKind.linear, ScheduleKind.constant])
def test_warmup_is_a_straight_line_to_the_peak(kind: ScheduleKind) -> None:
    """And wastes no update: the first rate is above 0."""
    got = curve(ScheduleConfig(kind, warmup=10))
    assert got[:10] == pytest.approx([PEAK * (s + 1) / 10 for s in range(10)])
    assert max(got) == got[9] == PEAK


def test_cosine_is_half_way_down_in_the_middle() -> None:
    got = curve(ScheduleConfig(ScheduleKind.cosine, warmup=20, floor=0.1))
    assert got[60] == pytest.approx(PEAK * 0.55)
    assert got[40] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))


def test_linear_is_a_straight_line_to_the_floor() -> None:
    got = curve(ScheduleConfig(ScheduleKind.linear, floor=0.5))
    steps = [b - a for a, b in pairwise(got)]
    assert steps == pytest.approx([-PEAK * 0.5 / 100] * 99)


@pytest.mark.parametrize("kind", [ScheduleKind.cosine, ScheduleKind.linear])
def test_the_last_update_is_not_wasted(kind: ScheduleKind) -> None:
    """Its rate is above the floor, and the rate after the end is the floor."""
    got = curve(ScheduleConfig(kind, end=50, floor=0.0))
    assert got[49] > 0
    assert got[50:] == [0.0] * 50


def test_constant_stays() -> None:
    assert curve(ScheduleConfig(ScheduleKind.constant)) == [PEAK] * 100


def test_wsd_is_stable_until_its_cooldown() -> None:
    got = curve(ScheduleConfig(ScheduleKind.wsd, warmup=10, cooldown=20, floor=0.1))
    assert got[9:81] == [PEAK] * 72
    assert got[90] == pytest.approx(PEAK * 0.55)
    assert got[99] == pytest.approx(PEAK * (0.1 + 0.9 / 20))


@pytest.mark.parametrize(
    "kind, cooldown", [(ScheduleKind.cosine, 0), (ScheduleKind.linear, 0), (ScheduleKind.wsd, 300)]
)
def test_tokens_and_steps_are_the_same_schedule(kind: ScheduleKind, cooldown: int) -> None:
    by_tokens = curve(ScheduleConfig(kind, unit=Unit.tokens, warmup=100, cooldown=cooldown, end=800, floor=0.1))
    by_steps = curve(ScheduleConfig(kind, warmup=10, cooldown=cooldown // 10, end=80, floor=0.1))
    assert by_tokens == pytest.approx(by_steps)


def test_the_run_ends_where_the_decay_ends() -> None:
    """In steps as in tokens."""
    assert curve(ScheduleConfig(ScheduleKind.linear, unit=Unit.tokens)) == pytest.approx(
        curve(ScheduleConfig(ScheduleKind.linear, unit=Unit.tokens, end=1000))
    )


def test_a_warmup_as_long_as_the_run_has_no_decay() -> None:
    assert curve(ScheduleConfig(ScheduleKind.cosine, warmup=100))[-1] == PEAK


@pytest.mark.parametrize("unit, longest", [(Unit.steps, 100), (Unit.tokens, 1000)])
def test_a_warmup_longer_than_the_run_names_all_operands(unit: Unit, longest: int) -> None:
    message = f"warmup={longest} \\+ cooldown=1 is longer than end={longest} {unit.value}.*max_steps=100"
    with pytest.raises(UserError, match=message):
        curve(ScheduleConfig(ScheduleKind.wsd, unit=unit, warmup=longest, cooldown=1))

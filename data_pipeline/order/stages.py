"""The ledger that a config plans, and lines that describe it. Numpy at most."""

from __future__ import annotations

from data_pipeline.config import DataConfig, RampConfig, StageConfig
from data_pipeline.order.geometry import ladder, micro_batch_at
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.mixture import quantise


def plan_ledger(
    data: DataConfig, *, n_ctx: int, tokens_per_step: int, ramp: RampConfig, past: Ledger | None = None, step: int = 0
) -> Ledger:
    """The ledger of a run: its events before `step` (`past`, None for a new run), then those that its config plans.

    A difference between the two is an event at `step`: each source continues from its place.

    Raises:
        UserError: as `ladder`.
    """
    ledger = past.until(step) if past and step else None
    tokens = ledger.tokens(step) if ledger else 0
    for rung in ladder(data, n_ctx=n_ctx, tokens_per_step=tokens_per_step, ramp=ramp, step=step, tokens=tokens):
        weights = quantise(rung.weights)
        if ledger is None:
            ledger = Ledger.start(rung.windows_per_step, rung.n_ctx, weights)
        size = {"windows_per_step": rung.windows_per_step, "n_ctx": rung.n_ctx}
        ledger = ledger.then(rung.step, **size, weights=weights)
    assert ledger is not None
    return ledger.jump_of(past, step) if past else ledger


def describe(ledger: Ledger, max_steps: int, dp: int, micro_batch_size: int) -> list[str]:
    """A line for each segment before `max_steps`: its first step, the size of a step, and the mixture."""
    lines = []
    for s in (s for s in ledger.segments if s.step < max_steps and s is ledger.segment(s.step)):
        total, windows = sum(s.weights.values()), s.windows_per_step // dp
        size = micro_batch_at(windows, micro_batch_size)
        mix = ", ".join(f"{name} {count / total:.4g}" for name, count in s.weights.items() if count)
        lost = "".join(f"; {name} without {len(shards)} lost shards" for name, shards in s.lost.items() if shards)
        lines.append(
            f"from step {s.step} ({ledger.tokens(s.step):,} tokens): {s.windows_per_step} windows of {s.n_ctx} tokens "
            f"a step = dp {dp} x micro batch {size} x {windows // size}; {mix}{lost}"
        )
    return lines


def rounding(data: DataConfig) -> list[str]:
    """A line for each weight that the integers of a period change by more than a hundredth of it."""
    lines, weights = [], {name: source.weight for name, source in data.sources.items()}
    for stage in (StageConfig(0, {}), *data.stages):
        weights |= stage.weights or {}
        counts, asked = quantise(weights), sum(weights.values())
        for name, count in counts.items():
            share, given = weights[name] / asked, count / sum(counts.values())
            if abs(given - share) > 0.01 * share:
                lines.append(
                    f"from step {stage.step}: {name} is drawn for {given:.3g} of the windows, {share:.3g} is asked "
                    f"for: weights are rounded to parts of {sum(counts.values())}"
                )
    return lines

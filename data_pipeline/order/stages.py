"""From what a config asks for to a ledger: stages, the batch ramp, and what a resumed run changes. Numpy at most."""

from __future__ import annotations

from data_pipeline.config import DataConfig, RampConfig, StageConfig
from data_pipeline.order.geometry import batches, micro_batch_at
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.mixture import quantise


def plan_ledger(
    data: DataConfig, *, n_ctx: int, tokens_per_step: int, ramp: RampConfig, past: Ledger | None = None, step: int = 0
) -> Ledger:
    """What a run has done before `step` (`past`, None for a new run) and, from there on, what its config asks for.

    A difference between the two is an event at `step`: each source goes on where it is.

    Raises:
        UserError: a batch that lanes do not divide, or a ramp that starts below one window for each lane.
    """
    ledger = past.until(step) if past and step else None
    stages = [StageConfig(0, {}, n_ctx, tokens_per_step), *data.stages]
    weights = {name: source.weight for name, source in data.sources.items()}
    for number, stage in enumerate(stages):
        end = stages[number + 1].step if number + 1 < len(stages) else None
        weights |= stage.weights or {}
        n_ctx, tokens_per_step = stage.n_ctx or n_ctx, stage.tokens_per_step or tokens_per_step
        if end is not None and end <= step:
            continue
        counts = quantise(weights)
        start = max(step, stage.step)
        done = ledger.tokens(start) if ledger else 0
        for at, windows in batches(done, start, end, n_ctx, tokens_per_step, ramp, data.lanes):
            if ledger is None:
                ledger = Ledger.start(windows, n_ctx, counts)
            ledger = ledger.then(at, windows_per_step=windows, n_ctx=n_ctx, weights=counts)
    assert ledger is not None
    return ledger.jump_of(past, step) if past else ledger


def describe(ledger: Ledger, max_steps: int, dp: int, micro_batch_size: int) -> list[str]:
    """A line for each segment before `max_steps`: from which step, how large a step, in which mixture."""
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
    """A line for each weight that integers of a period say otherwise by more than a hundredth of it."""
    lines, weights = [], {name: source.weight for name, source in data.sources.items()}
    for stage in (StageConfig(0, {}), *data.stages):
        weights |= stage.weights or {}
        counts, asked = quantise(weights), sum(weights.values())
        for name, count in counts.items():
            share, given = weights[name] / asked, count / sum(counts.values())
            if abs(given - share) > 0.01 * share:
                lines.append(
                    f"from step {stage.step}: {name} is drawn for {given:.3g} of the windows where {share:.3g} is "
                    f"asked for: weights are rounded to parts of {sum(counts.values())}"
                )
    return lines

"""The windows of each step (stages, batch ramp), and their split over ranks and micro steps. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from conf.errors import UserError
from data_pipeline.config import DataConfig, RampConfig, StageConfig


@dataclass(frozen=True)
class Geometry:
    """The split of a step's windows over ranks and micro steps."""

    windows_per_step: int
    windows_per_rank: int
    micro_batch_size: int  # windows per rank per micro step
    grad_accum_steps: int
    lanes: int
    dp: int


def batch_geometry(*, tokens_per_step: int, n_ctx: int, micro_batch_size: int, lanes: int, dp: int) -> Geometry:
    """Derive `grad_accum_steps` from the declared sizes.

    Raises:
        UserError: a number that does not divide, with the nearest ones that do.
    """
    if tokens_per_step < 1 or tokens_per_step % n_ctx:
        raise UserError(
            f"tokens_per_step={tokens_per_step} is not a multiple of model.n_ctx={n_ctx}: "
            f"give tokens_per_step={_nearest(tokens_per_step, n_ctx * lanes)}"
        )
    windows = tokens_per_step // n_ctx
    if windows % lanes:
        raise UserError(
            f"tokens_per_step={tokens_per_step} / model.n_ctx={n_ctx} = {windows} windows a step, not a "
            f"multiple of data.lanes={lanes}: give tokens_per_step={_nearest(tokens_per_step, n_ctx * lanes)}, "
            f"or data.lanes that divides {windows}"
        )
    if lanes % dp:
        good = [d for d in range(1, lanes + 1) if lanes % d == 0]
        near = sorted(good, key=lambda d: (abs(d - dp), d))[:2]
        fit = [n for n in range(dp, windows + 1, dp) if windows % n == 0]
        fit = sorted(sorted(fit, key=lambda n: abs(n - lanes))[:2])
        new_run = f"data.lanes={' or '.join(map(str, fit))}"
        if not fit:
            tokens = _nearest(tokens_per_step, n_ctx * dp)
            new_run = f"data.lanes={dp} and tokens_per_step={tokens} ({dp} ranks cannot share {windows} windows a step)"
        raise UserError(
            f"dp={dp} does not divide data.lanes={lanes}: run on dp={' or '.join(map(str, sorted(near)))} "
            f"(dp = ranks / parallel.tp), or start a new run with {new_run}"
        )
    if micro_batch_size < 1 or (windows // dp) % micro_batch_size:
        raise UserError(
            f"micro_batch_size={micro_batch_size} does not divide the {windows // dp} windows of a rank "
            f"(tokens_per_step={tokens_per_step} / model.n_ctx={n_ctx} / dp={dp}): give micro_batch_size="
            f"{_divisor_near(windows // dp, micro_batch_size)}"
        )
    return Geometry(windows, windows // dp, micro_batch_size, windows // dp // micro_batch_size, lanes, dp)


def batches(
    tokens: int, step: int, end: int | None, n_ctx: int, full: int, ramp: RampConfig, lanes: int
) -> Iterator[tuple[int, int]]:
    """Yield (first step, windows per step) of each size of the batch from `step` to before `end`.

    Args:
        tokens: trained on before `step`.
        full: tokens per step once the ramp is over.

    Raises:
        UserError: a batch that lanes do not divide, or a ramp that starts below one window for each lane.
    """
    each = lanes * n_ctx  # tokens of one window for each lane
    if full < 1 or full % each:
        low = full // each * each
        raise UserError(
            f"tokens_per_step={full} from step {step} on is not a multiple of data.lanes={lanes} windows of n_ctx="
            f"{n_ctx} tokens: give tokens_per_step={f'{low} or ' if low else ''}{low + each}"
        )
    start = full if ramp.start is None else ramp.start
    while end is None or step < end:
        grown = start + (full - start) * min(tokens, ramp.over) // ramp.over if tokens < ramp.over else full
        if grown < each or (start > full and tokens < ramp.over):
            raise UserError(
                f"batch_ramp.start={start} makes a batch of {grown} tokens at step {step}: it must be between one "
                f"window for each lane, data.lanes={lanes} x n_ctx={n_ctx} = {each} tokens and tokens_per_step={full}; "
                f"give batch_ramp.start={each}, or in a new run data.lanes={max(1, grown // n_ctx)}"
            )
        size = grown // each * each
        yield step, size // n_ctx
        if size == full:
            return
        needed = -((start - size - each) * ramp.over // (full - start))  # tokens at which the next size is reached
        steps = -(-(needed - tokens) // size)
        step, tokens = step + steps, tokens + steps * size


class Rung(NamedTuple):
    """Consecutive steps of one size, from `step` to before `end` (None: without end), drawn by `weights`."""

    step: int
    end: int | None
    windows_per_step: int
    n_ctx: int
    weights: dict[str, float]


def ladder(
    data: DataConfig, *, n_ctx: int, tokens_per_step: int, ramp: RampConfig, step: int = 0, tokens: int = 0
) -> Iterator[Rung]:
    """Yield the sizes of the steps from `step` on, in order: the stages, and within each the batch ramp.

    Args:
        n_ctx: before the first stage; so is tokens_per_step.
        tokens: trained on before `step`.

    Raises:
        UserError: a batch that lanes do not divide, or a ramp that starts below one window for each lane.
    """
    stages = [StageConfig(0, {}, n_ctx, tokens_per_step), *data.stages]
    weights = {name: source.weight for name, source in data.sources.items()}
    for stage, end in zip(stages, [*(stage.step for stage in data.stages), None], strict=True):
        weights |= stage.weights or {}
        n_ctx, tokens_per_step = stage.n_ctx or n_ctx, stage.tokens_per_step or tokens_per_step
        if end is not None and end <= step:
            continue
        sizes = list(batches(tokens, max(step, stage.step), end, n_ctx, tokens_per_step, ramp, data.lanes))
        for (first, windows), stop in zip(sizes, [*(later for later, _ in sizes[1:]), end], strict=True):
            yield Rung(first, stop, windows, n_ctx, dict(weights))
            tokens += 0 if stop is None else (stop - first) * windows * n_ctx


def micro_batch_at(windows: int, micro_batch_size: int) -> int:
    """Windows of a micro batch, if a step gives a rank `windows`: as asked, or the largest divisor below that."""
    return next(size for size in range(min(micro_batch_size, windows), 0, -1) if windows % size == 0)


def _nearest(value: int, multiple: int) -> str:
    low = value // multiple * multiple
    return f"{low} or {low + multiple}" if low else str(low + multiple)


def _divisor_near(n: int, wish: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wish), d))

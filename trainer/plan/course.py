"""How many steps of which size a run takes: its stages and its batch ramp, as its ledger has them. Stdlib only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_pipeline.config import StageConfig
from data_pipeline.order.geometry import batches, micro_batch_at
from trainer.config.pretrain import PretrainConfig
from trainer.plan.layout import Layout
from trainer.plan.network import Cluster
from trainer.plan.speed import step_seconds


@dataclass(frozen=True)
class Part:
    """So many steps in a row, each of `windows` windows of `n_ctx` tokens."""

    steps: int
    windows: int
    n_ctx: int

    @property
    def tokens(self) -> int:
        return self.steps * self.windows * self.n_ctx


def course(cfg: PretrainConfig, tokens: int | None) -> list[Part]:
    """The parts of a run to `tokens`, its last step whole, or to max_steps where they are None.

    Raises:
        UserError: a batch that lanes do not divide, or a ramp that starts below one window for each lane.
    """
    parts: list[Part] = []
    done = 0
    for first, end, windows, n_ctx in _sizes(cfg):
        left = cfg.max_steps - first if tokens is None else -(-(tokens - done) // (windows * n_ctx))
        part = Part(left if end is None else min(left, end - first), windows, n_ctx)
        if part.steps <= 0:
            break
        parts.append(part)
        done += part.tokens
    return parts


def _sizes(cfg: PretrainConfig) -> Iterator[tuple[int, int | None, int, int]]:
    """(first step, step after the last, windows, n_ctx), without end: the stages, and within each the ramp."""
    n_ctx, full, done = cfg.model.n_ctx, cfg.tokens_per_step, 0
    stages = [StageConfig(0), *cfg.data.stages]
    for number, stage in enumerate(stages):
        last = stages[number + 1].step if number + 1 < len(stages) else None
        n_ctx, full = stage.n_ctx or n_ctx, stage.tokens_per_step or full
        found = list(batches(done, stage.step, last, n_ctx, full, cfg.batch_ramp, cfg.data.lanes))
        for (first, windows), end in zip(found, [*(step for step, _ in found[1:]), last], strict=True):
            yield first, end, windows, n_ctx
            done += 0 if end is None else (end - first) * windows * n_ctx


def seconds(cfg: PretrainConfig, layout: Layout, cluster: Cluster, parts: Sequence[Part]) -> float:
    """Of the whole run. A smaller batch has a smaller micro batch where that does not divide it, as in a run."""
    total = 0.0
    for part in parts:
        here = replace(layout, micro_batch_size=micro_batch_at(part.windows // layout.dp, layout.micro_batch_size))
        model = replace(cfg.model, n_ctx=part.n_ctx)
        small = replace(cfg, model=model, tokens_per_step=part.windows * part.n_ctx)
        total += part.steps * step_seconds(small, here, cluster).total
    return total

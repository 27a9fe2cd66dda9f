"""Validation: the mean loss over each source's validation windows, the same bits on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from data_pipeline.manifest import Manifest
from data_pipeline.order.ledger import Segment
from trainer.data.feed import Feed
from trainer.engine.engine import Engine
from trainer.objective.objective import weighted_loss


def validate(
    engine: Engine,
    feed: Feed,
    val: Mapping[str, Manifest],
    segment: Segment,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[float, dict[str, float]]:
    """The objective's loss over the sources, weighted by what `segment` draws of them, and of each. Collective.

    A language model's loss is in nats per token. `on_progress` is called at each batch.

    Raises:
        UserError: on every rank, if one cannot read its windows.
    """
    losses = {name: _loss_on(engine, feed, manifest, segment.n_ctx, on_progress) for name, manifest in val.items()}
    weights = {name: segment.weights.get(name, 0) for name in losses}
    if not any(weights.values()):  # no source that is drawn now has validation data: those that have it count alike
        weights = dict.fromkeys(losses, 1)
    return sum(weights[name] * loss for name, loss in losses.items()) / sum(weights.values()), losses


def _loss_on(engine: Engine, feed: Feed, manifest: Manifest, n_ctx: int, on_progress: Callable[[], None]) -> float:
    """Every rank runs the same number of forwards and gets the same bits."""
    objective, device, unread = engine.objective, engine.mesh.device, None
    sums_and_counts = torch.zeros(2, len(objective.terms), dtype=torch.float64, device=device)
    for batch, error in feed.validation(manifest, n_ctx):
        on_progress()
        unread = unread or error
        sums_and_counts[0] += engine.evaluate(batch)
        counts = [math.nan] * len(objective.terms) if error else objective.counts(batch)
        sums_and_counts[1] += torch.tensor(counts, dtype=torch.float64, device=device)
    dist.all_reduce(sums_and_counts, group=engine.mesh.dp_group)
    dist.broadcast(sums_and_counts, src=0)  # the decision whether this is the best is taken on equal bits
    sums, counts = sums_and_counts.tolist()
    if math.isnan(counts[0]):
        feed.agree(unread)
    return weighted_loss(objective, sums, counts)

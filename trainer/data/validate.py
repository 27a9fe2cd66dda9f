"""Validation: the mean loss over each source's validation windows, the same bits on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from data_pipeline.config import IGNORE
from data_pipeline.manifest import Manifest
from data_pipeline.order.ledger import Segment
from trainer.data.feed import Feed
from trainer.engine.engine import Engine


def validate(
    engine: Engine, feed: Feed, val: Mapping[str, Manifest], here: Segment, moved: Callable[[], None] = lambda: None
) -> tuple[float, dict[str, float]]:
    """Nats per token: over the sources by what `here` draws of them, and of each. `moved`: called at each batch.
    Collective.

    Raises:
        UserError: on every rank, where one cannot read its windows.
    """
    losses = {name: _loss_on(engine, feed, manifest, here.n_ctx, moved) for name, manifest in val.items()}
    weights = {name: here.weights.get(name, 0) for name in losses}
    if not any(weights.values()):  # what is drawn now has no validation data: what there is counts alike
        weights = dict.fromkeys(losses, 1)
    return sum(weights[name] * loss for name, loss in losses.items()) / sum(weights.values()), losses


def _loss_on(engine: Engine, feed: Feed, manifest: Manifest, n_ctx: int, moved: Callable[[], None]) -> float:
    """Every rank runs the same number of forwards and gets the same bits."""
    mesh, unread = engine.mesh, None
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # loss, tokens
    for batch, error in feed.validation(manifest, n_ctx):
        moved()
        unread = unread or error
        sums[0] += engine.evaluate(batch)
        sums[1] += float("nan") if error else (batch.labels != IGNORE).sum()
    dist.all_reduce(sums, group=mesh.dp_group)
    dist.broadcast(sums, src=0)  # the decision whether this is the best is taken on equal bits
    total, tokens = sums.tolist()
    if math.isnan(tokens):
        feed.agree(unread)
    return float(total / tokens)

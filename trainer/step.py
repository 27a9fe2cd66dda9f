"""One optimizer step: batches, vote, gradient, judgement, update. The host waits for the device once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from trainer.config.optim import OptimConfig
from trainer.data.feed import AnyBatch, Feed
from trainer.distributed.device_copies import AsyncCopy, ComputeTimer
from trainer.distributed.randomness import seed_dropout
from trainer.engine.engine import Engine, NonFiniteError
from trainer.engine.schedule import lr_at
from trainer.health.recompute_check import recheck
from trainer.health.spike_guard import Guard
from trainer.metrics import Speed
from trainer.objective.objective import figures
from trainer.run.progress import Progress
from trainer.vote import Vote, add_votes, gradient_counts, kinds_of


@dataclass(frozen=True)
class Outcome:
    """The result of one step.

    `loss`: the objective, by its weights over its terms, each a mean over all ranks (nats per token for a language
    model); NaN if nothing counts. `figures`: of several terms, each by its name in metrics. `grad_norm`: global, before
    clipping. `vote`: the sum of all ranks' votes; if `vote.failed`, no weight has changed. `error`: why this rank has
    no batches. `part_norms`: of each trunk and head, empty for a single trunk.
    """

    loss: float
    figures: dict[str, float]
    grad_norm: float
    lr: float
    vote: Vote
    error: UserError | None
    part_norms: dict[str, float]


@dataclass
class Stepper:
    """Makes the steps of one engine and one feed. Collective."""

    engine: Engine
    feed: Feed
    guard: Guard
    speed: Speed
    progress: Progress
    optim: OptimConfig
    recheck_every: int  # steps; 0 = never
    seed: int
    max_steps: int

    def __post_init__(self) -> None:
        self._timer = ComputeTimer(self.engine.mesh.device)

    def step(self, step: int, wishes: Callable[[], Vote]) -> Outcome:
        """Make the update after `step` updates, unless a rank has failed or the guard refuses it.

        `wishes`: called once the batches are there, for this rank's vote, whose counts and `failed` are completed here.
        """
        engine, objective, ranks = self.engine, self.engine.objective, self.engine.mesh.world.world_size
        started = time.monotonic()
        batches, error = self.feed.next()
        waited = time.monotonic() - started
        self.speed.wait(waited)
        votes = add_votes(self._vote(wishes(), batches, error), engine.mesh)
        counts = gradient_counts(votes, len(objective.terms))
        recheck(engine, self.recheck_every, self.seed, step, batches[0])
        self._timer.start()
        sums = self._backward(step, batches, counts)
        self.progress.own(self._timer.stop(waited))
        losses = (sums / counts).where(counts != 0, 0.0)
        dist.all_reduce(losses, group=engine.mesh.dp_group)
        numbers = AsyncCopy(torch.cat([losses, votes]))  # on the host before the norm is

        def read() -> tuple[float, dict[str, float], Vote]:
            values = numbers.values()
            means, vote = values[: len(sums)], Vote.unpack(values[len(sums) :])
            loss = sum(weight * mean for weight, mean in zip(objective.weights, means, strict=True))
            return loss if any(vote.counts) else math.nan, figures(objective, means), vote

        def accept(norm: float) -> bool:
            loss, _, vote = read()
            return vote.same_kinds(ranks) and self.guard.judge(loss, norm) is None

        lr = self._lr(step)
        try:
            grad_norm = engine.step(lr, accept)
        except NonFiniteError as e:
            grad_norm = e.norm
        loss, named, vote = read()
        if not vote.same_kinds(ranks):
            raise RuntimeError(f"step {step}: the feed gives ranks micro batches of other kinds or numbers")
        return Outcome(loss, named, grad_norm, lr, vote, error, engine.part_norms)

    def _vote(self, wishes: Vote, batches: Sequence[AnyBatch], error: UserError | None) -> Vote:
        counts = tuple(0.0 for _ in self.engine.objective.terms)
        if self.engine.mesh.tp_rank == 0:
            counts = tuple(map(sum, zip(*(self.engine.objective.counts(batch) for batch in batches), strict=True)))
        failed = float(error is not None or wishes.failed > 0)
        return replace(wishes, counts=counts, kinds=kinds_of(batches), failed=failed)

    def _backward(self, step: int, batches: Sequence[AnyBatch], counts: Tensor) -> Tensor:
        """The sums [terms] over this rank's micro batches, fp32."""
        sums = torch.zeros(len(counts), device=counts.device)
        for micro_step, batch in enumerate(batches):
            seed_dropout(self.engine.mesh, self.seed, step, micro_step)
            sums += self.engine.backward(batch, counts, last=micro_step + 1 == len(batches))
        return sums

    def _lr(self, step: int) -> float:
        size = self.feed.size(step)
        return lr_at(
            self.optim.schedule,
            self.optim.lr,
            step=step,
            max_steps=self.max_steps,
            tokens=size.done,
            step_tokens=size.work,
            end_tokens=self.feed.size(self.max_steps).done,
        )

"""The feed of pre-training: windows of shards in the order of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from conf.errors import UserError
from data_pipeline.config import IGNORE, DataConfig, OnBadShard
from data_pipeline.manifest import Manifest
from data_pipeline.order.geometry import micro_batch_at
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import describe, rounding
from data_pipeline.remote.source import LostShard
from data_pipeline.stream.infill import LEAST, Infill
from data_pipeline.stream.loader import Batch, TrainLoader, validation_batches
from data_pipeline.stream.windows import ShardStream, shard_windows
from trainer.data.channel import channel
from trainer.data.feed import ValidationSet, agree
from trainer.data.sources import Sources, data_state, plan_of
from trainer.data.step_size import StepSize
from trainer.distributed.mesh import Mesh


class ShardFeed:
    """Batches of one rank from `step` on: an implementation of `feed.Feed`. Lost shards change `plan`."""

    def __init__(
        self,
        data: DataConfig,
        mesh: Mesh,
        sources: Sources,
        plan: Plan,
        *,
        step: int,
        n_ctx: int,
        max_steps: int,
        micro_batch_size: int,
        eval_windows: int | None,
        train_windows: int,
        infill: Infill | None = None,
    ) -> None:
        self.data = data
        self.mesh = mesh
        self.sources = sources
        self.plan = plan
        self._n_ctx = n_ctx
        self._max_steps = max_steps
        self._micro_batch_size = micro_batch_size
        self._eval_windows = eval_windows
        self._train_windows = train_windows
        self._infill = infill
        self._step = step  # that `next` gave last
        self._loader = self._open(step)

    def next(self) -> tuple[Sequence[Batch], UserError | None]:
        self._step = self._loader.step
        try:
            return self._loader.next(), None
        except UserError as error:
            segment = self.plan.ledger.segment(self._step)
            windows = segment.windows_per_step // self.mesh.dp
            size = micro_batch_at(windows, self._micro_batch_size)
            return [_empty(size, segment.n_ctx, 0)] * (windows // size), error

    def position(self, step: int) -> int:
        return self.plan.ledger.position(step)

    def size(self, step: int) -> StepSize:
        ledger = self.plan.ledger
        segment = ledger.segment(step)
        return StepSize(segment.windows_per_step, segment.n_ctx, ledger.tokens(step), mixture=segment.weights)

    def may_save(self, step: int) -> bool:
        return True

    def retire(self, error: UserError | None) -> list[str]:
        """Under data.on_bad_shard=skip, a shard that is lost for good is no longer drawn."""
        skip = self.data.on_bad_shard is OnBadShard.skip
        lost = error if skip and isinstance(error, LostShard) else None
        own = [(lost.source, lost.shard, str(lost))] if lost else []
        answers = agree(self.mesh, error if lost is None else None, own)
        reasons = []
        for source, shard, reason in sorted({each for answer in answers for each in answer}):
            self.plan = self._plan_of(self.plan.ledger.lose(self._step, self.plan.names[source], shard))
            reasons.append(reason)
        self._loader.close()
        self._loader = self._open(self._step)
        return reasons

    def jump(self, step: int, end: int) -> dict[str, Any]:
        plan = self._plan_of(self.plan.ledger.jump(step, end))
        return data_state(self.data, self.sources, plan, step)

    def state(self, step: int) -> dict[str, Any]:
        return data_state(self.data, self.sources, self.plan, step)

    def row(self, step: int) -> dict[str, float]:
        ledger = self.plan.ledger
        position = ledger.position(step)
        row: dict[str, float] = {
            **{f"data/epoch/{name}": self.plan.epoch(name, position) for name in self.sources.train},
            "data/position": ledger.position(step - 1),  # of the step's first window
            "data/tokens": ledger.tokens(step),
            "data/crc32": self._loader.crc32,  # of the tokens that this rank was fed
        }
        if len(self.sources.train) > 1:
            weights = ledger.segment(step - 1).weights
            total = sum(weights.values())
            row |= {f"data/share/{name}": weights.get(name, 0) / total for name in self.sources.train}
        return row

    def validation(self, step: int) -> Sequence[ValidationSet]:
        """Each source by the share that is drawn of it; if no source that is drawn has validation data, all alike.

        Then, of each, the first training windows that are not in a lost shard.
        """
        segment, val = self.plan.ledger.segment(step - 1), self.sources.val
        weights = {name: segment.weights.get(name, 0) for name in val}
        if not any(weights.values()):
            weights = dict.fromkeys(val, 1)
        n, windows = segment.n_ctx, self._train_windows
        train = self.sources.train if windows and val else {}
        sets = [
            ValidationSet(k, weights[k], self._first(self._windows(m, n), m, n), self._measures(m, n))
            for k, m in val.items()
        ]
        for name, m in train.items():
            first = self._first(windows, m, n, "eval.train_windows", segment.lost.get(name, ()))
            sets.append(ValidationSet(name, segment.weights.get(name, 0), first, trained=True))
        return sets

    def summary(self) -> list[str]:
        """The data of the run, with the tokens that no window holds."""
        ledger = self.plan.ledger
        end = ledger.position(self._max_steps)
        lines = [
            _source_line(name, m, self._n_ctx, self.plan.epoch(name, end)) for name, m in self.sources.train.items()
        ]
        lines += [
            f"data: from step {step} on, {tokens:,} tokens of {name} that make no window of the new n_ctx wait for its "
            "next epoch"
            for step, name, tokens in self.plan.unread()
        ]
        lines += describe(ledger, self._max_steps, self.mesh.dp, self._micro_batch_size)
        lines += rounding(self.data)
        if self._infill:
            lines.append(
                f"data: {self._infill.rate:g} of the pieces of at least {LEAST} tokens are rearranged to fill in the "
                "middle: each loses its last 3 tokens, or 4 where its document goes on; validation is plain"
            )
        lines += [] if self.sources.val else ["data: no source has validation data: there is no validation"]
        return [*lines, _open_shards(self.sources, self.plan, self.mesh.dp)]

    def close(self) -> None:
        self._loader.close()

    def _plan_of(self, ledger: Ledger) -> Plan:
        return plan_of(self.data, self.sources, ledger, seed=self.plan.seed, max_steps=self._max_steps)

    def _windows(self, manifest: Manifest, n_ctx: int) -> int:
        return self._eval_windows or int(shard_windows(manifest, n_ctx).sum())

    def _measures(self, manifest: Manifest, n_ctx: int) -> str:
        masked = " with a document mask" if self.data.document_mask else ""
        return f"{self._windows(manifest, n_ctx)} windows of {n_ctx} tokens{masked} of {manifest.sha256[:8]}"

    def _first(
        self, windows: int, manifest: Manifest, n_ctx: int, knob: str = "eval.windows", lost: Sequence[int] = ()
    ) -> Iterator[tuple[Batch, UserError | None]]:
        """The first `windows` windows of a source that are not in a lost shard, in batches."""
        mesh = self.mesh
        error = None
        left = -(-windows // (mesh.dp * self._micro_batch_size))
        with closing(ShardStream([manifest], open_shards=1, cache=self.sources.cache)) as stream:
            batches = validation_batches(
                manifest,
                stream,
                n_ctx,
                dp_rank=mesh.dp_rank,
                dp=mesh.dp,
                micro_batch_size=self._micro_batch_size,
                windows=windows,
                lost=lost,
                knob=knob,
                document_mask=self.data.document_mask,
                pin=mesh.device.type == "cuda",
                channel=channel(mesh),
            )
            try:
                for batch in batches:
                    left -= 1
                    yield batch, None
            except UserError as e:
                error = e
        for _ in range(left):
            yield _empty(self._micro_batch_size, n_ctx, IGNORE), error

    def _open(self, step: int) -> TrainLoader:
        mesh = self.mesh
        through = channel(mesh)
        stream = None
        if through is None or through.reads:
            train = self.sources.train  # a source that the config no longer names is not drawn: any replaces it
            manifests = [train.get(name, self.sources.any) for name in self.plan.names]
            shards = self.data.lanes // mesh.dp * len(train)
            stream = ShardStream(manifests, open_shards=shards, cache=self.sources.cache, infill=self._infill)
        return TrainLoader(
            self.plan,
            stream,
            dp_rank=mesh.dp_rank,
            dp=mesh.dp,
            micro_batch_size=self._micro_batch_size,
            document_mask=self.data.document_mask,
            step=step,
            pin=mesh.device.type == "cuda",
            channel=through,
        )


def _source_line(name: str, train: Manifest, n_ctx: int, epochs: float) -> str:
    windows = [s.windows(n_ctx) for s in train.shards]
    unused = sum(s.tokens - (n_ctx * w + 1 if w else 0) for s, w in zip(train.shards, windows, strict=True))
    return (
        f"data: {name}, {train.tokens:,} tokens = {sum(windows):,} windows, and {unused:,} tokens in tails too "
        f"short for one; the run takes {epochs:.2f} epochs"
    )


def _open_shards(sources: Sources, plan: Plan, dp: int) -> str:
    """The number of shards that a rank holds at once, and their bytes: one of each source for each lane."""
    lanes = plan.lanes // dp
    largest = {name: max(s.tokens for s in m.shards) * m.numpy_dtype.itemsize for name, m in sources.train.items()}
    mib = sum(lanes * size for size in largest.values()) >> 20
    return f"data: {lanes * len(largest)} shards open at once on each data-parallel rank, at most {mib:,} MiB"


def _empty(size: int, n_ctx: int, label: int) -> Batch:
    tokens = torch.zeros(size, n_ctx, dtype=torch.int64)
    return Batch(tokens, torch.full_like(tokens, label))

"""What a run is fed: its plan, this rank's loader, validation, and what all ranks agree on when data is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import TransientError, UserError
from data_pipeline.config import IGNORE, OnBadShard
from data_pipeline.manifest import Manifest
from data_pipeline.order.geometry import micro_batch_at
from data_pipeline.order.plan import Plan
from data_pipeline.remote.source import LostShard
from data_pipeline.stream.loader import Batch, TrainLoader, validation_batches
from data_pipeline.stream.windows import ShardStream, shard_windows
from trainer.config.pretrain import PretrainConfig
from trainer.data.channel import channel
from trainer.data.sources import Sources, plan_of
from trainer.distributed.mesh import Mesh


class Feed:
    """Batches of one rank from `step` on. `plan` changes where shards are lost; `loader` then is another."""

    def __init__(self, cfg: PretrainConfig, mesh: Mesh, sources: Sources, plan: Plan, step: int) -> None:
        self.cfg, self.mesh, self.sources, self.plan = cfg, mesh, sources, plan
        self.loader = self._open(step)

    def next(self) -> tuple[list[Batch], UserError | None]:
        """The micro batches of the next step; where they cannot be read, as many empty ones, and the reason."""
        try:
            return self.loader.next(), None
        except UserError as error:
            here = self.plan.ledger.segment(self.loader.step)
            windows = here.windows_per_step // self.mesh.dp
            size = micro_batch_at(windows, self.cfg.micro_batch_size)
            return [_empty(size, here.n_ctx, 0)] * (windows // size), error  # labels that count: NaN must come of them

    def retire(self, step: int, unread: UserError | None) -> list[str]:
        """Go on without the shards that ranks have lost for good, on all ranks from `step` on. Collective.

        `unread`: why this rank had no batch. Returns what is lost, in words.

        Raises:
            UserError: on every rank, where data.on_bad_shard=stop, data could not be read for another reason, or what
                is left does not do.
        """
        skip = self.cfg.data.on_bad_shard is OnBadShard.skip
        lost = unread if skip and isinstance(unread, LostShard) else None
        found = [(lost.source, lost.shard, str(lost))] if lost else []
        answers = self.agree(unread if lost is None else None, found)
        said = []
        for source, shard, why in sorted({each for answer in answers for each in answer}):
            ledger = self.plan.ledger.lose(step, self.plan.names[source], shard)
            self.plan = plan_of(self.cfg, self.sources, ledger)
            said.append(why)
        self.loader.close()
        self.loader = self._open(step)
        return said

    def agree(self, error: UserError | None, words: Any = None) -> list[Any]:
        """`words` of every rank. Collective.

        Raises:
            UserError: on every rank, where one has an error: its own, or that another has one.
        """
        mine = error if self.mesh.tp_rank == 0 else None  # others of a group have the reader's word for it
        answers: list[Any] = [None] * self.mesh.world.world_size
        dist.all_gather_object(answers, (mine is not None, isinstance(mine, TransientError), words))
        failed = [passing for has_error, passing, _ in answers if has_error]
        if failed:
            kind = TransientError if all(failed) else UserError
            if error is not None and isinstance(error, kind):
                raise error
            # what a reader says reaches the others of its group as text, without its kind
            raise kind(str(error) if error else "another rank could not read its data and says why") from None
        return [words for *_, words in answers]

    def validation(self, manifest: Manifest, n_ctx: int) -> Iterator[tuple[Batch, UserError | None]]:
        """A source's validation batches, as many on each rank; where one cannot be read, empty ones and the reason."""
        cfg, mesh, error = self.cfg, self.mesh, None
        windows = cfg.eval.windows or int(shard_windows(manifest, n_ctx).sum())
        left = -(-windows // (mesh.dp * cfg.micro_batch_size))
        with closing(ShardStream([manifest], open_shards=1, cache=self.sources.cache)) as stream:
            batches = validation_batches(
                manifest,
                stream,
                n_ctx,
                dp_rank=mesh.dp_rank,
                dp=mesh.dp,
                micro_batch_size=cfg.micro_batch_size,
                windows=cfg.eval.windows,
                document_mask=cfg.data.document_mask,
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
            yield _empty(cfg.micro_batch_size, n_ctx, IGNORE), error

    def row(self, step: int) -> dict[str, float]:
        """Where the data stands after `step` steps, for the journal."""
        ledger = self.plan.ledger
        here, position = ledger.segment(step - 1), ledger.position(step)
        row: dict[str, float] = {
            **{f"data/epoch/{name}": self.plan.epoch(name, position) for name in self.sources.train},
            "data/position": ledger.position(step - 1),  # of the step's first window
            "data/tokens": ledger.tokens(step),
            "data/crc32": self.loader.crc32,  # of the tokens that this rank was fed
        }
        if len(self.sources.train) > 1:
            total = sum(here.weights.values())
            row |= {f"data/share/{name}": here.weights.get(name, 0) / total for name in self.sources.train}
        return row

    def close(self) -> None:
        self.loader.close()

    def _open(self, step: int) -> TrainLoader:
        cfg, mesh, through = self.cfg, self.mesh, channel(self.mesh)
        stream = None
        if through is None or through.reads:
            train = self.sources.train  # a source that the config no longer names is not drawn: any may stand for it
            manifests = [train.get(name, self.sources.any) for name in self.plan.names]
            shards = cfg.data.lanes // mesh.dp * len(train)
            stream = ShardStream(manifests, open_shards=shards, cache=self.sources.cache)
        return TrainLoader(
            self.plan,
            stream,
            dp_rank=mesh.dp_rank,
            dp=mesh.dp,
            micro_batch_size=cfg.micro_batch_size,
            document_mask=cfg.data.document_mask,
            step=step,
            pin=mesh.device.type == "cuda",
            channel=through,
        )


def _empty(size: int, n_ctx: int, label: int) -> Batch:
    tokens = torch.zeros(size, n_ctx, dtype=torch.int64)
    return Batch(tokens, torch.full_like(tokens, label))

"""Sharing of batches inside a tensor-parallel group: its first rank reads, the others receive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from trainer.distributed.mesh import Mesh

if TYPE_CHECKING:
    from data_pipeline.stream.loader import Item


class TpChannel:
    """Gives a tp group what its rank 0 has read: a `data_pipeline.stream.loader.Channel`. For the main thread alone."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.reads = mesh.tp_rank == 0

    def share(self, item: Item | None) -> Item:
        """`item` of tp rank 0 (None elsewhere) on every rank; an error arrives as a UserError of its text."""
        if item is not None:
            payload = _payload(item)
            self._broadcast(torch.tensor([item.error is not None, item.crc32, *payload.shape]))
            self._broadcast(payload)
            return item
        from data_pipeline.stream.loader import Batch, Item

        failed, crc32, *shape = self._broadcast(torch.empty(6, dtype=torch.int64)).tolist()
        payload = self._broadcast(torch.empty(shape, dtype=torch.int64))
        if failed:
            return Item([], crc32, UserError(bytes(payload.flatten().tolist()).decode()))
        return Item([Batch(b[0], b[1], *(s.int() for s in b[2:])) for b in payload], crc32)

    def _broadcast(self, values: Tensor) -> Tensor:
        values = values.to(self.mesh.device)
        dist.broadcast(values, src=self.mesh.world.rank - self.mesh.tp_rank, group=self.mesh.tp_group)
        return values


def _payload(item: Item) -> Tensor:
    """Tokens, labels and perhaps segment ids, as int64 [micro steps, 2 or 3, B, T]; or the bytes of the
    error's text as [bytes, 1, 1, 1]."""
    if item.error is None:
        return torch.stack([torch.stack([t.long() for t in batch if t is not None]) for batch in item.batches])
    text = str(item.error) or type(item.error).__name__
    return torch.tensor(list(text.encode())).reshape(-1, 1, 1, 1)


def channel(mesh: Mesh) -> TpChannel | None:
    """The channel for the loader; None if each rank reads for itself (tp = 1)."""
    return TpChannel(mesh) if mesh.tp > 1 else None

"""A rank's batches: read ahead in a thread, handed over on the main thread. The only torch in data_pipeline."""

from __future__ import annotations

import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Ledger, Order, rank_positions
from data_pipeline.stream import ShardStream, shard_windows

IGNORE = -100  # the label that no loss counts
_READ_WINDOWS = 128  # windows that a rank reads at once, or those of one step where they are more
_READ_AHEAD = 2  # such reads wait to be used


class Batch(NamedTuple):
    """One micro batch. labels[b, t] follows tokens[b, t] in the text, or is IGNORE."""

    tokens: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64


class Item(NamedTuple):
    """What travels from the reader to those who wait: batches and their fingerprint, or the error there is instead."""

    batches: list[Batch]
    crc32: int
    error: Exception | None = None


class Channel(Protocol):
    """How the ranks of one tensor-parallel group get the same item. Used on the main thread alone.

    `reads` is true on the one rank of the group that reads shards. `share` gives every rank of the group that rank's
    item; the others pass None. An error travels as its text and arrives as a UserError.
    """

    @property
    def reads(self) -> bool: ...

    def share(self, item: Item | None) -> Item: ...


class TrainLoader:
    """Batches of one rank, step after step, from `step` on.

    Args:
        micro_batch_size: windows of a micro batch; divides the rank's windows of every step.
        step: the first step that `next` serves.
        pin: page-locked memory, for copies to a GPU.
        channel: absent where each rank reads for itself (tp = 1).

    `step` is the step that `next` serves next; `crc32` the checksum of the tokens that it served last.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        ledger: Ledger,
        n_ctx: int,
        *,
        dp_rank: int,
        dp: int,
        micro_batch_size: int,
        step: int = 0,
        pin: bool = False,
        channel: Channel | None = None,
    ) -> None:
        self.step, self.crc32 = step, 0
        self._order, self._ledger, self._n_ctx, self._dp_rank, self._dp = order, ledger, n_ctx, dp_rank, dp
        self._micro_batch_size, self._pin, self._channel = micro_batch_size, pin, channel
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[list[Item]] = queue.Queue(_READ_AHEAD)
        self._taken: deque[Item] = deque()
        self._thread: threading.Thread | None = None
        if channel is None or channel.reads:
            stream = ShardStream(manifest, n_ctx, open_shards=max(1, order.lanes // dp))
            self._thread = threading.Thread(target=self._read_ahead, args=(stream, step), name="loader", daemon=True)
            self._thread.start()

    def next(self) -> list[Batch]:
        """All micro batches of the next step, in order; waits where reading is behind.

        Raises:
            UserError: what went wrong in reading, on every rank of the tensor-parallel group; again at each call.
        """
        if self._error is None:
            item = _exchange(self._channel, self._take)
            self._error = item.error
        if self._error is not None:
            raise self._error
        self.step += 1
        self.crc32 = item.crc32
        return item.batches

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._error = self._error or RuntimeError("next() of a loader that is closed")
        self._stop.set()
        if self._thread is None:
            return
        # Frees a thread that waits to put; it puts at most once more, into an empty queue.
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join(timeout=5)  # not for ever: a read may hang in a dead file system, and the thread is a daemon

    def _take(self) -> Item:
        if not self._taken:
            self._taken.extend(self._ready.get())
        return self._taken.popleft()

    def _read_ahead(self, stream: ShardStream, step: int) -> None:
        """The thread: reads several steps at once where steps are small, since a read costs more than its bytes."""
        many = max(1, _READ_WINDOWS * self._dp // self._ledger.windows_per_step(step))
        while not self._stop.is_set():
            try:
                items = self._read_steps(stream, range(step, step + many))
            except Exception as error:
                if many > 1:  # the steps before the one that fails are good: read them one by one
                    many = 1
                    continue
                items = [Item([], 0, error)]
            self._ready.put(items)
            if items[-1].error is not None:
                return
            step += many

    def _read_steps(self, stream: ShardStream, steps: range) -> list[Item]:
        lanes, of = self._order.lanes, self._ledger
        at = [rank_positions(of.position(s), of.windows_per_step(s), lanes, self._dp_rank, self._dp) for s in steps]
        size = self._micro_batch_size
        for step, positions in zip(steps, at, strict=True):
            if len(positions) % size:
                raise UserError(
                    f"micro_batch_size={size} does not divide this rank's {len(positions)} windows of step {step}"
                )
        windows = stream.windows(*self._order.windows_at(np.concatenate(at)))
        batches = _batches(windows, size, self._pin)
        cuts = np.cumsum([0, *map(len, at)]).tolist()
        return [Item(batches[a // size : b // size], zlib.crc32(windows[a:b].data)) for a, b in pairwise(cuts)]


def validation_batches(
    manifest: Manifest,
    n_ctx: int,
    *,
    dp_rank: int,
    dp: int,
    micro_batch_size: int,
    windows: int | None = None,
    pin: bool = False,
    channel: Channel | None = None,
) -> Iterator[Batch]:
    """The first `windows` windows of a source (None: all), dealt to the ranks in turn.

    Every rank gets the same number of batches; what is missing to the last is filled with IGNORE labels.

    Raises:
        UserError: at the call, a source with fewer windows; while iterating, as `TrainLoader.next`.
    """
    counts = shard_windows(manifest, n_ctx)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if windows is None else windows
    if not 0 < total <= ends[-1]:
        raise UserError(
            f"eval.windows={windows}, but {manifest.root} holds {ends[-1]} windows of model.n_ctx={n_ctx} + 1 tokens "
            f"({manifest.tokens} tokens): give 1 to {ends[-1]}, or null for all"
        )
    stream, deal = ShardStream(manifest, n_ctx), dp * micro_batch_size

    def read(first: int) -> Item:
        at = np.arange(first, min(first + micro_batch_size, total))
        shards = np.searchsorted(ends, at, side="right")
        try:
            tokens = stream.windows(shards, at - (ends - counts)[shards])
        except Exception as error:
            return Item([], 0, error)
        return Item(_batches(tokens, micro_batch_size, pin), zlib.crc32(tokens.data))

    def serve() -> Iterator[Batch]:
        for start in range(0, total, deal):
            item = _exchange(channel, partial(read, start + dp_rank * micro_batch_size))
            if item.error is not None:
                raise item.error
            yield from item.batches

    return serve()


def _batches(windows: np.ndarray, micro_batch_size: int, pin: bool) -> list[Batch]:
    """Windows [n, T + 1] as micro batches; at least one, the last filled with token 0 and IGNORE labels."""
    n, n_ctx = len(windows), windows.shape[1] - 1
    full = max(1, -(-n // micro_batch_size)) * micro_batch_size
    tokens, labels = (torch.empty((full, n_ctx), dtype=torch.int64, pin_memory=pin) for _ in range(2))
    tokens.numpy()[:n], labels.numpy()[:n] = windows[:, :-1], windows[:, 1:]
    tokens[n:], labels[n:] = 0, IGNORE
    return [Batch(*pair) for pair in zip(tokens.split(micro_batch_size), labels.split(micro_batch_size), strict=True)]


def _exchange(channel: Channel | None, read: Callable[[], Item]) -> Item:
    if channel is None:
        return read()
    return channel.share(read() if channel.reads else None)

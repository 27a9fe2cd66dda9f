"""The batches of a rank: a thread reads ahead, the main thread takes them. The only torch in data_pipeline."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.manifest import Manifest
from data_pipeline.order.geometry import micro_batch_at
from data_pipeline.order.plan import Plan, Windows, rank_positions
from data_pipeline.stream.windows import ShardStream, shard_windows

_PLAN_WINDOWS = 2048  # windows of a rank in one call of the plan: a call costs more than its windows
_READ_WINDOWS = 64  # windows in one read, or those of a step if they are more: few enough for the processor's cache
_READ_AHEAD = 2  # reads that wait to be used
PATIENCE_S = 5.0  # seconds for the thread to end


class Batch(NamedTuple):
    """One micro batch. labels[b, t] follows tokens[b, t] in the text, or is IGNORE."""

    tokens: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64
    segment_ids: Tensor | None = None  # [B, T] int32: the document of each token, counted from 0 in each window


class Item(NamedTuple):
    """One step of a rank: its batches and the checksum of their tokens, or an error instead."""

    batches: list[Batch]
    crc32: int
    error: Exception | None = None


class Channel(Protocol):
    """Gives the ranks of one tensor-parallel group the same item. Used on the main thread only.

    `reads` is true on the one rank of the group that reads shards. `share` gives every rank of the group that rank's
    item; the others pass None. An error is sent as its text and arrives as a UserError.
    """

    @property
    def reads(self) -> bool: ...

    def share(self, item: Item | None) -> Item: ...


class TrainLoader:
    """Batches of one rank, step after step, from `step` on.

    Args:
        stream: reads the shards; None on a rank whose channel reads for it. Closed with the loader.
        micro_batch_size: windows of a micro batch; if it does not divide a rank's windows of a step (a batch ramp), the
            largest number below that does.
        document_mask: give the document of each token, and no label across documents.
        step: the first step that `next` serves.
        pin: page-locked memory, for copies to a GPU.
        channel: None if each rank reads for itself (tp = 1).

    `step` is the step that `next` serves next; `crc32` is the checksum of the tokens that it served last.
    """

    def __init__(
        self,
        plan: Plan,
        stream: ShardStream | None,
        *,
        dp_rank: int,
        dp: int,
        micro_batch_size: int,
        document_mask: bool = False,
        step: int = 0,
        pin: bool = False,
        channel: Channel | None = None,
    ) -> None:
        self.step = step
        self.crc32 = 0
        self._plan = plan
        self._stream = stream
        self._dp_rank = dp_rank
        self._dp = dp
        self._micro_batch_size = micro_batch_size
        self._channel = channel
        self._rows = partial(_Rows, segments=document_mask, pin=pin)
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[list[Item]] = queue.Queue(_READ_AHEAD)
        self._taken: deque[Item] = deque()
        self._thread: threading.Thread | None = None
        if stream is not None:
            self._thread = threading.Thread(target=self._read_ahead, args=(stream, step), name="loader", daemon=True)
            self._thread.start()

    def next(self) -> list[Batch]:
        """All micro batches of the next step, in order; waits for them if reading is behind.

        Raises:
            UserError: an error of reading, on every rank of the tensor-parallel group, again at each call. LostShard on
                the rank that reads, if a shard is lost for good.
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
        if self._thread is None or self._stream is None:
            return
        self._stream.stop()
        # Frees a thread that waits to put; it puts at most once more, into an empty queue.
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join(timeout=PATIENCE_S)  # a read may hang in a dead file system
        if not self._thread.is_alive():  # else the thread closes it, if it ever returns
            self._stream.close()

    def _take(self) -> Item:
        if not self._taken:
            self._taken.extend(self._ready.get())
        return self._taken.popleft()

    def _read_ahead(self, stream: ShardStream, step: int) -> None:
        """Body of the thread."""
        items: list[Item] = []
        try:
            for steps, windows in self._planned(stream, step):
                self._read(stream, steps, windows, items)
                self._ready.put(items)
                items = []
                if self._stop.is_set():
                    return
        except Exception as error:  # the steps before the one that fails are good
            self._ready.put([*items, Item([], 0, error)])
        finally:
            if self._stop.is_set():
                stream.close()

    def _planned(self, stream: ShardStream, step: int) -> Iterator[tuple[range, Windows]]:
        """Steps to read together, and their windows; planned many at a time, and announced to the stream first."""
        steps, windows = self._plan_from(step)
        yield steps[:1], windows.rows(slice(len(windows.source) // len(steps)))  # alone, so that it comes soon
        following = self._plan_from(step + 1)
        while True:
            steps, windows = following
            following = self._plan_from(steps.stop)
            stream.expect(following[1], self._n_ctx(steps.stop))
            each = len(windows.source) // len(steps)
            many = max(1, _READ_WINDOWS // each)
            for first in range(0, len(steps), many):
                yield steps[first : first + many], windows.rows(slice(first * each, (first + many) * each))

    def _plan_from(self, step: int) -> tuple[range, Windows]:
        """Some steps from `step` on, in one segment of the ledger, and this rank's windows of them."""
        ledger = self._plan.ledger
        each = ledger.segment(step).windows_per_step
        end = step + max(1, _PLAN_WINDOWS * self._dp // each)
        steps = range(step, min([end, *(s.step for s in ledger.segments if s.step > step)]))
        return steps, self._plan.windows_at(self._positions(steps))

    def _positions(self, steps: range) -> np.ndarray:
        """Those of this rank in steps of one segment of the ledger."""
        ledger = self._plan.ledger
        windows = ledger.segment(steps.start).windows_per_step * len(steps)
        first = ledger.position(steps.start)
        return rank_positions(first, windows, self._plan.lanes, self._dp_rank, self._dp)

    def _read(self, stream: ShardStream, steps: range, windows: Windows, items: list[Item]) -> None:
        each = len(windows.source) // len(steps)
        size = micro_batch_at(each, self._micro_batch_size)
        rows, positions = self._rows(len(windows.source), self._n_ctx(steps.start)), self._positions(steps)
        for batches in rows.batches(size, each):
            first = len(items) * each
            part = slice(first, first + each)
            items.append(Item(batches, rows.read(stream, windows.rows(part), first, positions[part])))

    def _n_ctx(self, step: int) -> int:
        return self._plan.ledger.segment(step).n_ctx


class _Rows:
    """The memory of some windows, and their micro batches as views of it."""

    def __init__(self, n: int, n_ctx: int, *, segments: bool, pin: bool) -> None:
        self.n_ctx = n_ctx
        self.tokens = torch.empty((n, n_ctx), dtype=torch.int64, pin_memory=pin)
        self.labels = torch.empty((n, n_ctx), dtype=torch.int64, pin_memory=pin)
        self.segments = torch.empty((n, n_ctx), dtype=torch.int32, pin_memory=pin) if segments else None

    def read(self, stream: ShardStream, windows: Windows, first: int = 0, positions: np.ndarray | None = None) -> int:
        """Fill the rows from `first` on with windows; returns their checksum."""
        rows = slice(first, first + len(windows.source))
        segments = None if self.segments is None else self.segments.numpy()[rows]
        return stream.read(
            windows, self.n_ctx, self.tokens.numpy()[rows], self.labels.numpy()[rows], segments, positions
        )

    def fill(self, first: int) -> None:
        """Make the rows from `first` on empty: token 0, and no label that counts."""
        self.tokens[first:] = 0
        self.labels[first:] = IGNORE
        if self.segments is not None:
            self.segments[first:] = 0

    def batches(self, size: int, each: int) -> Iterator[list[Batch]]:
        """Micro batches of `size` rows, those of `each` rows together."""
        parts = [part.split(size) for part in (self.tokens, self.labels, self.segments) if part is not None]
        batches = [Batch(*views) for views in zip(*parts, strict=True)]
        return (batches[n : n + each // size] for n in range(0, len(batches), each // size))


def validation_batches(
    manifest: Manifest,
    stream: ShardStream | None,
    n_ctx: int,
    *,
    dp_rank: int,
    dp: int,
    micro_batch_size: int,
    windows: int | None = None,
    lost: Sequence[int] = (),
    knob: str = "eval.windows",
    document_mask: bool = False,
    pin: bool = False,
    channel: Channel | None = None,
) -> Iterator[Batch]:
    """The first `windows` windows of a source (None: all) outside of its `lost` shards, dealt to the ranks in turn.

    `stream` reads `manifest` only (None on a rank whose channel reads for it). Every rank gets the same number of
    batches; missing windows of the last one have IGNORE labels.

    Raises:
        UserError: at the call, a source with fewer windows; in the iteration, as `TrainLoader.next`.
    """
    counts = shard_windows(manifest, n_ctx)
    counts[list(lost)] = 0
    ends = np.cumsum(counts)
    total = int(ends[-1]) if windows is None else windows
    if not 0 < total <= ends[-1]:
        raise UserError(
            f"{knob}={windows}, but {manifest.root} holds {ends[-1]} windows of model.n_ctx={n_ctx} + 1 tokens "
            f"({manifest.tokens} tokens, lost shards: {len(lost)}): give 1 to {ends[-1]}"
        )
    deal = dp * micro_batch_size

    def read(first: int) -> Item:
        numbers = np.arange(first, min(first + micro_batch_size, total))
        shards = np.searchsorted(ends, numbers, side="right")
        rows = _Rows(micro_batch_size, n_ctx, segments=document_mask, pin=pin)
        try:
            assert stream is not None
            window = numbers - (ends - counts)[shards]
            crc32 = rows.read(stream, Windows(np.zeros_like(numbers), shards, window * n_ctx))
        except Exception as error:
            return Item([], 0, error)
        rows.fill(len(numbers))
        return Item(next(rows.batches(micro_batch_size, micro_batch_size)), crc32)

    def serve() -> Iterator[Batch]:
        for start in range(0, total, deal):
            item = _exchange(channel, partial(read, start + dp_rank * micro_batch_size))
            if item.error is not None:
                raise item.error
            yield from item.batches

    return serve()


def _exchange(channel: Channel | None, read: Callable[[], Item]) -> Item:
    if channel is None:
        return read()
    return channel.share(read() if channel.reads else None)

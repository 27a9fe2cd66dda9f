"""What a rank is served equals direct slices of the shards' tokens, whoever reads and wherever it starts."""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.manifest import Manifest, index_of
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan, rank_positions
from data_pipeline.remote.source import ShardError
from data_pipeline.stream.loader import Batch, Item, TrainLoader, validation_batches
from data_pipeline.stream.windows import ShardStream, read_shard
from tests.helpers.fixtures import random_source

N_CTX, LANES, STEP = 16, 4, 8
TOKENS = [900, 3, 1300, 500, 40]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return random_source(tmp_path, TOKENS)


START = Ledger.start(STEP, N_CTX, {"test": 1})


def plan_of(manifest: Manifest, ledger: Ledger = START) -> Plan:
    return Plan({"test": [shard.tokens for shard in manifest.shards]}, ledger, lanes=LANES, seed=5)


def loader(
    manifest: Manifest, *, dp_rank: int = 0, dp: int = 1, micro: int = 2, ledger: Ledger = START, **kwargs: Any
) -> TrainLoader:
    channel = kwargs.get("channel")
    stream = ShardStream([manifest], open_shards=LANES // dp) if channel is None or channel.reads else None
    plan = plan_of(manifest, ledger)
    return TrainLoader(plan, stream, dp_rank=dp_rank, dp=dp, micro_batch_size=micro, **kwargs)


class Slices:
    """Windows cut from the shards' whole token streams."""

    def __init__(self, manifest: Manifest, ledger: Ledger = START) -> None:
        self.streams = [read_shard(manifest, shard) for shard in manifest.shards]
        self.plan = plan_of(manifest, ledger)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The windows at these positions: [n, n_ctx + 1]."""
        _, shards, starts = self.plan.windows_at(positions)
        n_ctx = self.plan.ledger.segments[self.plan.ledger.number_at(int(positions[0]))].n_ctx
        return np.stack([self.streams[s][a : a + n_ctx + 1] for s, a in zip(shards, starts, strict=True)])


def validation(manifest: Manifest, **kwargs: Any) -> Iterator[Batch]:
    channel = kwargs.get("channel")
    stream = ShardStream([manifest], open_shards=1) if channel is None or channel.reads else None
    return validation_batches(manifest, stream, N_CTX, **kwargs)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        (x.tokens == y.tokens).all() and (x.labels == y.labels).all() for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(("dp", "micro"), [(1, 8), (1, 2), (2, 1), (2, 4), (4, 2)])
def test_batches_are_slices_of_the_token_stream(manifest: Manifest, dp: int, micro: int) -> None:
    truth = Slices(manifest)
    for rank in range(dp):
        with closing(loader(manifest, dp_rank=rank, dp=dp, micro=micro)) as ours:
            for step in range(60):  # the source's 170 windows nearly three times
                batches = ours.next()
                expected = truth.at(rank_positions(step * STEP, STEP, LANES, rank, dp))
                assert [b.tokens.shape for b in batches] == [(micro, N_CTX)] * (STEP // dp // micro)
                assert np.array_equal(np.concatenate([b.tokens.numpy() for b in batches]), expected[:, :-1])
                assert np.array_equal(np.concatenate([b.labels.numpy() for b in batches]), expected[:, 1:])
                assert ours.crc32 == zlib.crc32(expected.tobytes())
                assert ours.step == step + 1


def test_a_restart_at_any_step_goes_on_as_if_there_had_been_none(manifest: Manifest) -> None:
    with closing(loader(manifest)) as whole:
        expected = [(whole.next(), whole.crc32) for _ in range(50)]
    for k in (1, 7, 21, 49):
        with closing(loader(manifest, step=k)) as ours:
            assert ours.step == k
            for batches, crc32 in expected[k:]:
                assert same(ours.next(), batches)
                assert ours.crc32 == crc32


def test_the_ledgers_events_hold_at_their_steps(manifest: Manifest) -> None:
    ledger = START.then(5, position=100).then(9, position=200, windows_per_step=2 * STEP).then(14, n_ctx=5)
    truth = Slices(manifest, ledger)
    with closing(loader(manifest, ledger=ledger)) as ours:
        for step in range(30):
            got = np.concatenate([b.tokens.numpy() for b in ours.next()])
            at = np.arange(ledger.position(step), ledger.position(step) + ledger.segment(step).windows_per_step)
            assert np.array_equal(got, truth.at(at)[:, :-1])


@pytest.mark.parametrize(("windows", "sizes"), [(8, [4, 4]), (12, [4, 4, 4]), (20, [4] * 5), (28, [4] * 7)])
def test_a_growing_batch_has_the_largest_micro_batches(manifest: Manifest, windows: int, sizes: list[int]) -> None:
    """A batch that grows has the largest micro batches that divide it."""
    ledger = START.then(3, windows_per_step=windows)
    with closing(loader(manifest, ledger=ledger, micro=5)) as ours:
        for _ in range(3):
            assert [len(b.tokens) for b in ours.next()] == [4, 4]
        for _ in range(9):
            assert [len(b.tokens) for b in ours.next()] == (sizes if windows != 20 else [5] * 4)


def test_document_masks_say_which_document_each_token_is_of(manifest: Manifest) -> None:
    """Against a walk through the index's lengths, token by token."""
    indexes = [index_of(manifest, shard) for shard in manifest.shards]
    document = [[n for n, length in enumerate(i.document_tokens) for _ in range(length)] for i in indexes]
    plan = plan_of(manifest)
    with closing(loader(manifest, document_mask=True)) as masked, closing(loader(manifest)) as plain:
        for step in range(40):
            rows = [row for batch in masked.next() for row in zip(*batch, strict=True)]
            bare = [row for batch in plain.next() for row in zip(*batch[:2], strict=True)]
            assert masked.crc32 == plain.crc32
            _, windows = plan.step(step)
            for row, (tokens, labels), shard, start in zip(rows, bare, windows.shard, windows.start, strict=True):
                mine = document[shard][start : start + N_CTX + 1]
                numbers = {d: i for i, d in enumerate(dict.fromkeys(mine))}
                assert row[0].tolist() == tokens.tolist()
                assert row[2].tolist() == [numbers[d] for d in mine[:-1]]
                wanted = [x if a == b else IGNORE for x, a, b in zip(labels.tolist(), mine, mine[1:], strict=False)]
                assert row[1].tolist() == wanted


def test_batches_do_not_change_after_they_were_handed_over(manifest: Manifest) -> None:
    with closing(loader(manifest)) as ours:
        first = ours.next()
        copies = [Batch(b.tokens.clone(), b.labels.clone()) for b in first]
        for _ in range(100):
            ours.next()
        assert same(first, copies)


def test_an_error_of_the_thread_comes_after_good_steps(manifest: Manifest) -> None:
    """An error of the thread comes after the good steps, and at each later call."""
    shards = plan_of(manifest).windows_at(range(168)).shard.tolist()
    good, bad = max((shards.index(s) // STEP, s) for s in set(shards))  # the shard first needed last, and when
    assert good > 1
    (manifest.root / manifest.shards[bad].name).unlink()
    with closing(loader(manifest)) as ours:
        for _ in range(good):
            ours.next()
        for _ in range(2):
            with pytest.raises(ShardError, match=rf"{manifest.shards[bad].name}: No such file"):
                ours.next()
        assert ours.step == good


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_close_ends_the_thread_at_once_wherever_it_is(manifest: Manifest, steps: int) -> None:
    for pause in (0.0, 0.2):  # still reading; waiting with its queue full
        ours = loader(manifest)
        for _ in range(steps):
            ours.next()
        time.sleep(pause)
        begin = time.monotonic()
        ours.close()
        ours.close()
        assert time.monotonic() - begin < 20
        assert "loader" not in [t.name for t in threading.enumerate()]
        with pytest.raises(RuntimeError, match="closed"):
            ours.next()


def test_close_after_an_error_does_not_hang(manifest: Manifest) -> None:
    for shard in manifest.shards:
        (manifest.root / shard.name).unlink()
    ours = loader(manifest)
    with pytest.raises(ShardError):
        ours.next()
    ours.close()
    with pytest.raises(ShardError):
        ours.next()


def test_a_late_thread_closes_the_stream(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that returns late closes the stream and opens nothing."""
    monkeypatch.setattr("data_pipeline.stream.loader.PATIENCE_S", 0.05)
    ours = loader(manifest)
    stream, thread = ours._stream, ours._thread
    assert stream is not None and thread is not None
    hangs, go_on, read = threading.Event(), threading.Event(), stream.read

    def late(*args: Any) -> int:
        hangs.set()
        go_on.wait(60)
        return read(*args)

    ours.next()  # else its first read may hang, which the next() below would wait for
    monkeypatch.setattr(stream, "read", late)
    for _ in range(40):
        if hangs.wait(2.0):  # it reads on as soon as there is room
            break
        ours.next()
    assert hangs.wait(60)
    ours.close()
    assert thread.is_alive() and stream._open  # it may be reading from them
    go_on.set()
    thread.join(60)
    assert not thread.is_alive() and not stream._open


class Pipe:
    """A channel between two loaders of one process; errors travel as text."""

    def __init__(self, reads: bool, line: queue.Queue[Item]) -> None:
        self.reads, self.line, self.threads = reads, line, set[str]()

    def share(self, item: Item | None) -> Item:
        self.threads.add(threading.current_thread().name)
        if item is not None:
            self.line.put(item if item.error is None else item._replace(error=UserError(str(item.error))))
            return item
        return self.line.get(timeout=60)


@pytest.fixture
def pair(manifest: Manifest) -> Iterator[tuple[TrainLoader, TrainLoader, Pipe]]:
    line: queue.Queue[Item] = queue.Queue()
    sender = Pipe(True, line)
    with closing(loader(manifest, channel=sender)) as a, closing(loader(manifest, channel=Pipe(False, line))) as b:
        yield a, b, sender


def test_ranks_that_do_not_read_get_the_readers_batches(pair: tuple[TrainLoader, TrainLoader, Pipe]) -> None:
    reader, other, sender = pair
    assert [t.name for t in threading.enumerate()].count("loader") == 1
    for _ in range(30):
        batches = reader.next()
        assert same(other.next(), batches)
        assert (other.step, other.crc32) == (reader.step, reader.crc32)
    assert sender.threads == {threading.current_thread().name}


def test_an_error_of_the_reader_is_everyones_error(manifest: Manifest) -> None:
    for shard in manifest.shards:
        (manifest.root / shard.name).unlink()
    line: queue.Queue[Item] = queue.Queue()
    with (
        closing(loader(manifest, channel=Pipe(True, line))) as a,
        closing(loader(manifest, channel=Pipe(False, line))) as b,
    ):
        for ours in (a, b, a, b):
            with pytest.raises(UserError, match="No such file"):
                ours.next()


@pytest.mark.parametrize(("dp", "micro", "windows"), [(1, 4, None), (2, 4, 50), (4, 8, 33), (4, 8, 1), (3, 1, 170)])
def test_validation_deals_every_window_once(manifest: Manifest, dp: int, micro: int, windows: int | None) -> None:
    """Validation deals every window once and fills only the last batch."""
    ranks = [list(validation(manifest, dp_rank=r, dp=dp, micro_batch_size=micro, windows=windows)) for r in range(dp)]
    total = windows or 170
    assert {len(batches) for batches in ranks} == {-(-total // (dp * micro))}
    rows = [
        row for batches in zip(*ranks, strict=True) for b in batches for row in zip(b.tokens, b.labels, strict=True)
    ]
    streams = [read_shard(manifest, shard) for shard in manifest.shards]
    wanted = [t[j : j + N_CTX + 1] for t in streams for j in range(0, len(t) - N_CTX, N_CTX)][:total]
    assert len(wanted) == total
    for (tokens, labels), window in zip(rows, wanted, strict=False):
        assert tokens.tolist() == window[:-1].tolist()
        assert labels.tolist() == window[1:].tolist()
    assert all((labels == IGNORE).all() and (tokens == 0).all() for tokens, labels in rows[total:])
    assert all(b.tokens.shape == b.labels.shape == (micro, N_CTX) for batches in ranks for b in batches)


@pytest.mark.parametrize("windows", [0, 171])
def test_validation_refuses_too_many_windows(manifest: Manifest, windows: int) -> None:
    """Validation refuses more windows than the source has, at the call."""
    with pytest.raises(UserError, match=rf"eval.windows={windows}, but .* holds 170 windows of model.n_ctx=16"):
        validation(manifest, dp_rank=0, dp=1, micro_batch_size=4, windows=windows)


def test_windows_of_lost_shards_are_passed_over(manifest: Manifest) -> None:
    how: dict[str, Any] = {"dp_rank": 0, "dp": 1, "micro_batch_size": 1}
    counts = np.cumsum([0, *(shard.windows(N_CTX) for shard in manifest.shards)])
    every = list(validation(manifest, **how))
    first = [
        *every[: counts[1]],
        *every[counts[2] : counts[2] + 3],
    ]  # none of shard 1
    assert same(list(validation(manifest, windows=len(first), lost=[1], **how)), first)
    left = len(every) - (counts[2] - counts[1])
    with pytest.raises(UserError, match=rf"eval.train_windows=9999, but .* holds {left} .* lost shards: 1"):
        validation(manifest, windows=9999, lost=[1], knob="eval.train_windows", **how)


def test_validation_names_a_bad_shard(manifest: Manifest) -> None:
    (manifest.root / "00002.tar").unlink()
    batches = validation(manifest, dp_rank=0, dp=1, micro_batch_size=8)
    with pytest.raises(ShardError, match=r"00002.tar: No such file"):
        list(batches)


def test_validation_goes_through_the_channel_too(manifest: Manifest) -> None:
    line: queue.Queue[Item] = queue.Queue()
    (a, b, alone) = (
        validation(manifest, dp_rank=0, dp=1, micro_batch_size=8, channel=channel)
        for channel in (Pipe(True, line), Pipe(False, line), None)
    )
    for read, received, expected in zip(a, b, alone, strict=True):
        assert same([read, received], [expected, expected])
    (manifest.root / "00000.tar").unlink()
    for reads in (True, False):
        batches = validation(manifest, dp_rank=0, dp=1, micro_batch_size=8, channel=Pipe(reads, line))
        with pytest.raises(UserError, match=r"00000.tar: No such file"):
            next(batches)

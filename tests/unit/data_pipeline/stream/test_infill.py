"""Windows that are rearranged to fill in the middle hold the text that was there, and follow from their positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.stream.infill import LEAST, Infill
from data_pipeline.stream.loader import Batch, TrainLoader, validation_batches
from data_pipeline.stream.windows import ShardStream
from tests.helpers.fixtures import make_source
from tests.helpers.seeds import seeded

PREFIX, SUFFIX, MIDDLE, END = 70_001, 70_002, 70_003, 256
N_CTX, LANES, STEP = 48, 4, 8


def infill(rate: float, seed: int) -> Infill:
    return Infill(rate, seed, PREFIX, SUFFIX, MIDDLE, END)


def documents(rng: np.random.Generator, n: int, longest: int) -> list[np.ndarray]:
    """Texts of different ids, so that no place of one is taken for another; each with its end."""
    return [np.append(rng.permutation(256)[: rng.integers(0, longest)], END) for _ in range(n)]


def some_windows(rng: np.random.Generator, n: int, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of random documents, and the first token of each document in them, as (row, cut)."""
    text, row, cut = np.empty((n, N_CTX + 1), np.int64), [], []
    for i in range(n):
        docs = documents(rng, N_CTX + 2, longest)
        begin = rng.integers(0, len(docs[0]))
        text[i] = np.concatenate(docs)[begin : begin + N_CTX + 1]
        starts = np.cumsum([len(doc) for doc in docs]) - begin
        starts = starts[starts <= N_CTX]
        row, cut = [*row, *[i] * len(starts)], [*cut, *starts.tolist()]
    return text, np.array(row, int), np.array(cut, int)


def pieces(text: np.ndarray, row: np.ndarray, cut: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of each piece of a document."""
    for i in range(len(text)):
        bounds = [0, *sorted(set(cut[row == i].tolist())), text.shape[1]]
        yield from ((i, a, b) for a, b in pairwise(bounds))


def restored(piece: list[int]) -> tuple[list[int], list[int]]:
    """The text of a rearranged piece, read from its tokens, and what follows its end."""
    suffix, middle = piece.index(SUFFIX), piece.index(MIDDLE)
    end = piece.index(END, middle)
    assert piece[0] == PREFIX and suffix < middle < end
    return piece[1:suffix] + piece[middle + 1 : end] + piece[suffix + 1 : middle], piece[end + 1 :]


@pytest.mark.parametrize("longest", [12, 40, 200])
def test_the_text_of_a_rearranged_piece_comes_back(longest: int) -> None:
    seed = seeded()
    text, row, cut = some_windows(np.random.default_rng(seed), 300, longest)
    mine = text.copy()
    rows, cuts = infill(0.7, seed).windows(mine, row, cut, np.arange(300))
    places = set(zip(rows.tolist(), cuts.tolist(), strict=True))
    assert places >= set(zip(row.tolist(), cut.tolist(), strict=True))
    changed = 0
    for i, start, stop in pieces(text, row, cut):
        old, new = text[i, start:stop].tolist(), mine[i, start:stop].tolist()
        assert len(old) >= LEAST or new == old
        if new == old:
            continue
        changed += 1
        back, rest = restored(new)
        if old[-1] == END:  # the document ends here: all of it, without the last three ids of its text
            assert (back, rest) == (old[:-4], [])
        else:
            assert back + rest == old[:-4] and len(back) >= 4
            assert not rest or (i, start + len(back) + 4) in places
    assert changed > 50


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_the_share_of_rearranged_pieces_is_the_rate(rate: float) -> None:
    """Within six standard deviations of a binomial draw, which one seed in 500 million leaves."""
    seed = seeded()
    text, row, cut = some_windows(np.random.default_rng(seed), 1000, 60)
    mine = text.copy()
    infill(rate, seed).windows(mine, row, cut, np.arange(1000))
    long = [(i, start) for i, start, stop in pieces(text, row, cut) if stop - start >= LEAST]
    share = sum(mine[at] == PREFIX for at in long) / len(long)
    assert abs(share - rate) <= 6 * math.sqrt(rate * (1 - rate) / len(long))


def test_middles_lie_and_end_all_over_a_window() -> None:
    """In windows of one long document too, where a model would else only see ends at the last token."""
    seed, n = seeded(), 3000
    text = np.random.default_rng(seed).integers(0, 256, (n, N_CTX + 1))
    none = np.empty(0, int)
    infill(1.0, seed).windows(text, none, none, np.arange(n))
    assert (text[:, 0] == PREFIX).all()
    ends = np.argmax(text == END, axis=1)
    counts = np.bincount(ends, minlength=N_CTX + 1)
    expected = n / (N_CTX + 1 - 7)  # each length from 4 to 45 alike
    assert not counts[:7].any()
    assert np.abs(counts[7:] - expected).max() <= 6 * math.sqrt(expected)
    assert len(set(np.argmax(text == MIDDLE, axis=1).tolist())) > N_CTX // 2


def test_a_window_follows_from_seed_and_position_alone() -> None:
    seed = seeded()
    text, row, cut = some_windows(np.random.default_rng(seed), 64, 60)
    positions = np.random.default_rng(seed).permutation(10**6)[:64]
    whole = text.copy()
    infill(0.8, seed).windows(whole, row, cut, positions)
    for i in np.random.default_rng(seed).permutation(64)[:20]:
        alone = text[i : i + 1].copy()
        infill(0.8, seed).windows(alone, np.zeros((row == i).sum(), int), cut[row == i], positions[i : i + 1])
        assert np.array_equal(alone[0], whole[i])
    for other, at in ((seed + 1, positions), (seed, positions + 10**6)):
        mine = text.copy()
        infill(0.8, other).windows(mine, row, cut, at)
        assert (mine != whole).any(axis=1).sum() > 32
    infill(0.0, seed).windows(before := text.copy(), row, cut, positions)
    assert np.array_equal(before, text)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rng = np.random.default_rng(3)
    return make_source(tmp_path, [documents(rng, n, 70) for n in (60, 30, 45)], vocab_size=257, eot_id=END)


def served(
    manifest: Manifest, steps: range, rate: float | None, *, rank: int = 0, dp: int = 1, **kwargs: Any
) -> list[tuple[list[Batch], int]]:
    """Batches and their checksums; `rate`: None, a stream that knows of no rearranging."""
    plan = Plan(
        {"test": [s.tokens for s in manifest.shards]}, Ledger.start(STEP, N_CTX, {"test": 1}), lanes=LANES, seed=5
    )
    stream = ShardStream([manifest], open_shards=LANES, infill=None if rate is None else infill(rate, 11))
    own = TrainLoader(plan, stream, dp_rank=rank, dp=dp, micro_batch_size=2, step=steps.start, **kwargs)
    with closing(own) as loader:
        return [(loader.next(), loader.crc32) for _ in steps]


def tokens(steps: list[tuple[list[Batch], int]]) -> np.ndarray:
    """[steps, windows, n_ctx + 1]: each label is the token that follows."""
    return np.array(
        [
            [
                np.append(t, labels[-1])
                for b in some
                for t, labels in zip(b.tokens.numpy(), b.labels.numpy(), strict=True)
            ]
            for some, _ in steps
        ]
    )


def rows_of(*windows: np.ndarray) -> set[bytes]:
    return {row.tobytes() for part in windows for row in part.reshape(-1, N_CTX + 1)}


def test_rearranged_windows_are_equal_on_all_ranks(manifest: Manifest) -> None:
    """On each number of ranks, and from any step on; ids above uint16 come through."""
    whole = served(manifest, range(24), 0.6)
    assert (tokens(whole) == PREFIX).any() and {b.labels.max().item() for some, _ in whole for b in some} >= {MIDDLE}
    assert [crc for _, crc in served(manifest, range(9, 24), 0.6)] == [crc for _, crc in whole[9:]]
    ranks = [tokens(served(manifest, range(24), 0.6, rank=rank, dp=2)) for rank in range(2)]
    assert rows_of(*ranks) == rows_of(tokens(whole))
    assert len(rows_of(tokens(whole))) > len(rows_of(tokens(served(manifest, range(24), 0.0)))), "each epoch alike"


def test_rate_0_and_validation_have_the_same_bytes(manifest: Manifest) -> None:
    plain, zero = served(manifest, range(20), None), served(manifest, range(20), 0.0)
    assert np.array_equal(tokens(plain), tokens(zero))
    with closing(ShardStream([manifest], open_shards=1, infill=infill(1.0, 11))) as stream:
        batches = list(validation_batches(manifest, stream, N_CTX, dp_rank=0, dp=1, micro_batch_size=4))
    assert not any((b.tokens >= PREFIX).any() for b in batches)


def test_a_rest_behind_an_end_is_a_document_of_its_own(manifest: Manifest) -> None:
    """A document mask hides the rearranged part from it, and the end's label is none."""
    rests = 0
    for batches, _ in served(manifest, range(30), 1.0, document_mask=True):
        for batch in batches:
            assert batch.segment_ids is not None
            for ids, labels, segments in zip(batch.tokens, batch.labels, batch.segment_ids, strict=True):
                ends = (ids == END).nonzero().flatten().tolist()
                for at in ends:
                    assert labels[at] == -100
                    assert at + 1 == len(ids) or segments[at + 1] == segments[at] + 1
                rests += len(ends)
    assert rests > 100


@pytest.mark.parametrize("rate", [-0.1, 1.01, math.nan])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=r"data.fim_rate=.*: give a share from 0, which rearranges nothing, to 1"):
        DataConfig("x", "y", {"a": SourceConfig("b")}, 4, fim_rate=rate)

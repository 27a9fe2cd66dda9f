"""All documents that are compared, of this corpus and of others, numbered through; their keys are read part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import UserError, of_nature
from data_pipeline.prepare.dedup.groups import MEMBER_BYTES, Indices, Members
from data_pipeline.prepare.dedup.keys import ENDING, KeysFile
from data_pipeline.prepare.recipe_config import DedupConfig, MinHashConfig
from data_pipeline.text.hashing import U64

Codes = npt.NDArray[np.uint8]
Rows = tuple[int, KeysFile, Indices, U64]
"""The index of a file's first row, the file, some of its rows, their keys."""
Reader = Callable[[int, KeysFile], U64]
"""The keys of a file, given the index of its first row."""
KINDS = 3  # codes of each corpus
STAYING_BYTES = 10  # of memory for each document all the time: its code, its group, and a mark that it has one
_FIRST = np.iinfo(np.int64).min
_ANEW = "make that corpus again, data_pipeline.prepare.run"


@dataclass(frozen=True)
class Other:
    """Another corpus: its keys, and the codes that `find` gave it, or None if all its documents stay."""

    name: str
    keys: Path
    codes: Path | None = None


def read_codes(path: Path) -> Codes:
    """The codes of a part, [rows].

    Raises:
        UserError: no such file, or a damaged one.
    """
    try:
        codes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise of_nature(e, f"{path}: not a part's removals ({e}): {_ANEW}") from None
    if not isinstance(codes, np.ndarray) or codes.dtype != np.uint8 or codes.ndim != 1:
        raise UserError(f"{path}: not a part's removals, one uint8 a row: {_ANEW}")
    return codes


class Documents:
    """The documents of the other corpora come first, so that they are the first, and best, of every group.

    `codes` [total] are not 0 for documents that are out already; `own` is the index of the first document of this
    corpus; `limit` documents are sorted at once.
    """

    def __init__(self, keys: Path, others: Sequence[Other], cfg: DedupConfig) -> None:
        if len(others) * KINDS + KINDS > np.iinfo(np.uint8).max:
            raise UserError(f"dedup.against: {len(others)} corpora, give at most 84: prepare some of them as one")
        self._others = others
        self.files: list[tuple[int, KeysFile]] = []  # and the index of the first row
        self.total = 0
        self._ends: list[int] = []  # of each other corpus
        given = []
        for other in others:
            given += [self._given(other, file) for file in self._open(other.keys, cfg.minhash)]
            self._ends.append(self.total)
        self.own = self.total
        self._parts = self._open(keys, cfg.minhash)
        self.codes: Codes = np.concatenate([*given, np.zeros(self.total - self.own, np.uint8)])
        self.limit = int((cfg.memory_gib * 2**30 - self.total * STAYING_BYTES) // MEMBER_BYTES)
        if self.limit < 1:
            staying = self.total * STAYING_BYTES / 2**30
            raise UserError(
                f"dedup.memory_gib={cfg.memory_gib}: {self.total:,} documents take {staying:.3f} before any is "
                f"compared: give several times that"
            )

    def _open(self, folder: Path, minhash: MinHashConfig | None) -> list[KeysFile]:
        files = [KeysFile(path, minhash) for path in sorted(folder.glob(f"*{ENDING}"))]
        if not folder.is_dir():
            raise UserError(f"{folder}: no keys of documents: make that corpus with a recipe that has dedup")
        for file in files:
            self.files.append((self.total, file))
            self.total += file.rows
        return files

    @staticmethod
    def _given(other: Other, file: KeysFile) -> Codes:
        if other.codes is None:
            return np.zeros(file.rows, np.uint8)
        path = other.codes / f"{file.path.stem}.npy"
        codes = read_codes(path)
        if len(codes) != file.rows:
            raise UserError(f"{path}: {len(codes)} rows, {file.path} has {file.rows}: {_ANEW}")
        return codes

    def parts(self) -> Iterator[tuple[str, Codes]]:
        """(name, codes) of each part of this corpus."""
        start = self.own
        for file in self._parts:
            yield file.path.stem, self.codes[start : start + file.rows]
            start += file.rows

    def lose(self, losers: Indices, winners: Indices, kind: int) -> None:
        """Take losers of this corpus out; the code says which corpus the winner is in."""
        mine = losers >= self.own
        corpus = np.searchsorted(self._ends, winners[mine], "right")
        number = np.where(winners[mine] >= self.own, 0, corpus + 1)
        self.codes[losers[mine]] = kind + KINDS * number

    def locate(self, index: int) -> dict[str, Any]:
        """A document's {part, row}, or the other corpus that has it."""
        if index < self.own:
            return {"corpus": self._others[int(np.searchsorted(self._ends, index, "right"))].name}
        start, file = self.files[int(np.searchsorted([s for s, _ in self.files], index, "right")) - 1]
        return {"part": file.path.stem, "row": index - start}

    def rounds(self, read: Reader, cost: int = MEMBER_BYTES) -> Iterator[Iterator[Rows]]:
        """Documents that have a key (not 0), not out yet, by ranges of keys that fit in memory at `cost` bytes each."""
        needed = self.total * cost / (self.limit * MEMBER_BYTES)
        count = 1 if needed <= 1 else ceil(2 * needed)  # keys are spread evenly enough for twice the memory
        for number in range(count):
            yield self._round(read, number, count)

    def _round(self, read: Reader, number: int, count: int) -> Iterator[Rows]:
        for start, file in self.files:
            keys = read(start, file)
            fit = (keys != 0) & (self.codes[start : start + file.rows] == 0)
            if count > 1:
                fit &= ((keys >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32) == number
            index = np.flatnonzero(fit)
            yield start, file, index, keys[index]

    def ranked(self, rows: Iterator[Rows]) -> Iterator[Members]:
        """Members with their ranks: a document of another corpus is before all of this one, and counts for no size."""
        for start, file, index, keys in rows:
            score, date = file.column("score")[index], file.column("date")[index]
            score = np.where(np.isnan(score), np.float32(-np.inf), score)
            if start < self.own:
                score, date = np.full_like(score, np.inf), np.full_like(date, _FIRST)
            yield Members(keys, start + index, score, date, np.full(len(index), int(start >= self.own)))

    def sets(self, index: Indices) -> Iterator[npt.NDArray[np.uint32]]:
        """The n-gram sets of documents whose indices are sorted."""
        for start, file in self.files:
            low, high = np.searchsorted(index, (start, start + file.rows))
            if low < high:
                yield from file.sets(index[low:high] - start)

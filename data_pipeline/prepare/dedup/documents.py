"""All documents that are looked at, of this corpus and of others, in one row; read from their keys part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import UserError
from data_pipeline.prepare.dedup.groups import MEMBER_BYTES, Indices, Members
from data_pipeline.prepare.dedup.keys import ENDING, KeysFile
from data_pipeline.prepare.dedup.words import U64
from data_pipeline.prepare.recipe_config import DedupConfig, MinHashConfig

Codes = npt.NDArray[np.uint8]
Rows = tuple[int, KeysFile, Indices, U64]
"""The index of a file's first row, the file, which of its rows, their keys."""
Reader = Callable[[int, KeysFile], U64]
"""The keys of a file, given the index of its first row."""
KINDS = 3  # codes of each corpus
STAYING_BYTES = 10  # of memory for each document all the time: its code, its group and whether it has one
_FIRST = np.iinfo(np.int64).min
_ANEW = "make that corpus anew, data_pipeline.prepare.run"


@dataclass(frozen=True)
class Other:
    """Another corpus: its keys, and the codes that `find` gave it, or None where all its documents stay."""

    name: str
    keys: Path
    codes: Path | None = None


def read_codes(path: Path) -> Codes:
    """[rows] of a part.

    Raises:
        UserError: no such file, or a damaged one.
    """
    try:
        codes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path}: not a part's removals ({e}): {_ANEW}") from None
    if not isinstance(codes, np.ndarray) or codes.dtype != np.uint8 or codes.ndim != 1:
        raise UserError(f"{path}: not a part's removals, one uint8 a row: {_ANEW}")
    return codes


class Documents:
    """Those of the other corpora come first, so that they are the first, and best, of every group.

    `codes` [total] says which are out already; `own` is the index of the first one of this corpus; `most` is how many
    are sorted at once.
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
        self.most = int((cfg.memory_gib * 2**30 - self.total * STAYING_BYTES) // MEMBER_BYTES)
        if self.most < 1:
            staying = self.total * STAYING_BYTES / 2**30
            raise UserError(
                f"dedup.memory_gib={cfg.memory_gib}: {self.total:,} documents take {staying:.3f} before any is "
                f"compared: give several times that"
            )

    def _open(self, folder: Path, minhash: MinHashConfig | None) -> list[KeysFile]:
        found = [KeysFile(path, minhash) for path in sorted(folder.glob(f"*{ENDING}"))]
        if not folder.is_dir():
            raise UserError(f"{folder}: no keys of documents: make that corpus with a recipe that has dedup")
        for file in found:
            self.files.append((self.total, file))
            self.total += file.rows
        return found

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
        """This corpus' parts: name and codes."""
        start = self.own
        for file in self._parts:
            yield file.path.stem, self.codes[start : start + file.rows]
            start += file.rows

    def lose(self, losers: Indices, winners: Indices, kind: int) -> None:
        """Take losers of this corpus out; the code says in which corpus the winner is."""
        mine = losers >= self.own
        corpus = np.searchsorted(self._ends, winners[mine], "right")
        place = np.where(winners[mine] >= self.own, 0, corpus + 1)
        self.codes[losers[mine]] = kind + KINDS * place

    def place(self, index: int) -> dict[str, Any]:
        """Where a document is: {part, row}, or the other corpus."""
        if index < self.own:
            return {"corpus": self._others[int(np.searchsorted(self._ends, index, "right"))].name}
        start, file = self.files[int(np.searchsorted([s for s, _ in self.files], index, "right")) - 1]
        return {"part": file.path.stem, "row": index - start}

    def rounds(self, read: Reader, cost: int = MEMBER_BYTES) -> Iterator[Iterator[Rows]]:
        """Those that have a key (not 0) and are not out yet, by ranges of keys that fit in memory at `cost` bytes."""
        needed = self.total * cost / (self.most * MEMBER_BYTES)
        count = 1 if needed <= 1 else ceil(2 * needed)  # keys are spread evenly enough for twice the room
        for turn in range(count):
            yield self._round(read, turn, count)

    def _round(self, read: Reader, turn: int, count: int) -> Iterator[Rows]:
        for start, file in self.files:
            keys = read(start, file)
            fit = (keys != 0) & (self.codes[start : start + file.rows] == 0)
            if count > 1:
                fit &= ((keys >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32) == turn
            at = np.flatnonzero(fit)
            yield start, file, at, keys[at]

    def ranked(self, rows: Iterator[Rows]) -> Iterator[Members]:
        """With the rank by which one of a group stays; one of another corpus is before all, and counts for none."""
        for start, file, at, keys in rows:
            score, date = file.column("score")[at], file.column("date")[at]
            score = np.where(np.isnan(score), np.float32(-np.inf), score)
            if start < self.own:
                score, date = np.full_like(score, np.inf), np.full_like(date, _FIRST)
            yield Members(keys, start + at, score, date, np.full(len(at), int(start >= self.own)))

    def sets(self, index: Indices) -> Iterator[npt.NDArray[np.uint32]]:
        """The n-gram sets of documents whose indices are sorted."""
        for start, file in self.files:
            low, high = np.searchsorted(index, (start, start + file.rows))
            if low < high:
                yield from file.sets(index[low:high] - start)

"""The journal (metrics.jsonl): JSON, one line for each logged step. Standard library only.

    {"step": 100, "generation": 1, "time": 1767225600.25, "metrics": {"train/loss": 3.4123}}

The row of a validation may have `"samples"`, a list of texts that the model wrote (eval.samples).
A *generation* is one start of the run. Its first line also has `"resumed_at"`, the step of the checkpoint from which it
resumes: later steps of earlier generations are then superseded, since they are done again. Floats are written as
Python's shortest repr, so they are read back bit for bit; those that JSON lacks are the texts "nan", "inf" and "-inf".
"""

from __future__ import annotations

import errno
import json
import math
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

from conf.errors import UserError, of_nature

FSYNC_S = 1.0  # so much of the newest rows may be gone after a power cut; a checkpoint's are flushed before it


@dataclass(frozen=True)
class Row:
    """One line of the journal."""

    step: int
    generation: int
    time: float  # seconds since 1970
    metrics: dict[str, float] = field(default_factory=dict)
    resumed_at: int | None = None  # only in a generation's first row, and then equal to step
    samples: tuple[str, ...] = ()  # texts drawn at a validation

    def line(self) -> bytes:
        body = {k: v for k, v in asdict(self).items() if k not in ("resumed_at", "samples") or v not in (None, ())}
        body["metrics"] = {k: v if math.isfinite(v) else str(float(v)) for k, v in self.metrics.items()}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


class JournalWriter:
    """The appending end: a queue and the thread that empties it into the file, fsynced each second that brought rows.

    A last line torn by a kill is cut off first, so that the next one starts on its own line.
    """

    def __init__(self, path: Path) -> None:
        _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)  # unbuffered: a row survives the process as soon as it is written
        self._error: OSError | None = None
        self._queue: queue.SimpleQueue[Row | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Queue a row and return at once. Raises UserError if an earlier row could not be written."""
        self._refuse_after_error()
        self._queue.put(row)

    def flush(self) -> None:
        """Return when all rows are fsynced. Raises UserError if one could not be written."""
        if self._thread.is_alive():
            safe = threading.Event()
            self._queue.put(safe)
            safe.wait()
        self._refuse_after_error()

    def close(self) -> None:
        """Flush, and end the thread. Raises as flush does."""
        try:
            self.flush()
        finally:
            self._queue.put(None)
            self._thread.join()
            self._file.close()

    def _run(self) -> None:
        due: float | None = None  # time.monotonic of the next fsync; None: all rows are safe
        while True:
            try:
                item = self._queue.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except queue.Empty:
                item = threading.Event()  # nobody waits for this one
            if item is None:
                return
            try:
                if isinstance(item, Row) and self._error is None:  # after an error no more: the journal has no hole
                    self._write(item.line())
                    due = due or time.monotonic() + FSYNC_S
                if isinstance(item, threading.Event) or (due is not None and due <= time.monotonic()):
                    due = None
                    if self._error is None:
                        os.fsync(self._file.fileno())
            except OSError as e:
                self._error = e
            if isinstance(item, threading.Event):
                item.set()

    def _write(self, line: bytes) -> None:
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, f"a line of {len(line)} bytes was written in part", self._file.name)

    def _refuse_after_error(self) -> None:
        if self._error is not None:
            message = f"metrics cannot be written: {self._error}: make room, then start again (it resumes)"
            raise of_nature(self._error, message)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as f:
        end = whole = f.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            f.seek(start)
            newline = f.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < whole:
            f.truncate(end)


def read_rows(path: Path, offset: int = 0) -> Iterator[tuple[Row, int]]:
    """Each complete row from byte `offset` on, superseded ones too, with the byte where it ends.

    Raises:
        UserError: a complete line that is no row.
    """
    with path.open("rb") as f:
        f.seek(offset)
        for line in f:
            if not line.endswith(b"\n"):
                return  # torn by a kill, or being written just now
            yield parse_row(line, path, offset), offset + len(line)
            offset += len(line)


def parse_row(line: bytes, path: Path, offset: int) -> Row:
    """The row in a line. Raises UserError, which names the file and the byte, if it is none."""
    try:
        body = json.loads(line)
        metrics = {str(k): float(v) for k, v in body["metrics"].items()}
        resumed_at = body.get("resumed_at")
        return Row(
            int(body["step"]),
            int(body["generation"]),
            float(body["time"]),
            metrics,
            resumed_at if resumed_at is None else int(resumed_at),
            tuple(map(str, body.get("samples", ()))),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(
            f"{path}: the line at byte {offset} is no journal row ({e!r}): remove the line, or restore it"
        ) from None


def read_journal(path: Path) -> list[Row]:
    """The run without superseded rows, as `joined`.

    Raises:
        UserError: a complete line that is no row.
    """
    return joined(row for row, _ in read_rows(path))


def joined(rows: Iterable[Row]) -> list[Row]:
    """One row for each step, in the order of steps, without those that a later start did again.

    Rows of the same step (training, then validation) are one row; of a metric in both, the newest counts.
    """
    rows = sorted(rows, key=lambda row: row.generation)
    lowest, back = math.inf, {}  # generation: the lowest step from which a later start resumed
    for generation, group in groupby(reversed(rows), key=lambda row: row.generation):
        back[generation] = lowest
        lowest = min([lowest, *(row.step for row in group if row.resumed_at is not None)])
    kept: dict[int, Row] = {}
    for row in rows:
        if row.resumed_at is None and row.step <= back[row.generation]:
            before = kept.get(row.step, row)
            metrics, samples = {**before.metrics, **row.metrics}, row.samples or before.samples
            kept[row.step] = Row(row.step, row.generation, row.time, metrics, samples=samples)
    return [kept[step] for step in sorted(kept)]


def superseded(rows: Iterable[Row]) -> list[dict[str, int]]:
    """The steps that a later start did again: {"generation", "from_step", "to_step"} of each start that has some."""
    resumed: dict[int, int] = {}  # generation: the step from which it resumed
    last: dict[int, int] = {}  # and the last that it logged
    for row in rows:
        last[row.generation] = max(last.get(row.generation, 0), row.step)
        if row.resumed_at is not None:
            resumed[row.generation] = row.resumed_at
    ranges = []
    for generation, to_step in sorted(last.items()):
        back_to = min((step for later, step in resumed.items() if later > generation), default=to_step)
        if back_to < to_step:
            ranges.append({"generation": generation, "from_step": back_to + 1, "to_step": to_step})
    return ranges


def seconds_trained(rows: Iterable[Row]) -> float:
    """Seconds between the first and the last row of each start, added up: steps that were done again count twice."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for row in rows:
        first.setdefault(row.generation, row.time)
        last[row.generation] = max(row.time, last.get(row.generation, row.time))
    return sum(last[generation] - first[generation] for generation in last)


class NewNumbers:
    """Reads the journal for a store that cannot take back: exact repeats of steps done again are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._since = -1  # offset of the generation that `_earlier` belongs to; -1: none yet
        self._earlier: dict[tuple[int, str], str] = {}  # values in earlier lines of the steps that it does again

    def rows(self, offset: int) -> Iterator[tuple[Row, int]]:
        """As read_rows, but a row has only the numbers that are new or have changed (its speed mostly has)."""
        if not 0 <= self._since <= offset:
            self._enter_generation_at(offset)
        start = offset
        for row, end in read_rows(self._path, offset):
            if row.resumed_at is not None:
                self._enter(row, start)
            news = {k: v for k, v in row.metrics.items() if self._earlier.get((row.step, k)) != repr(v)}
            yield replace(row, metrics=news), end
            start = end

    def _enter_generation_at(self, offset: int) -> None:
        self._since = start = 0
        self._earlier = {}
        first = None
        for row, end in read_rows(self._path):
            if end > offset:
                break
            if row.resumed_at is not None:
                first = (row, start)
            start = end
        if first:
            self._enter(*first)

    def _enter(self, first: Row, start: int) -> None:
        self._since = start
        self._earlier = {}
        for row, end in read_rows(self._path):
            if end > start:
                break
            if row.step > first.step:
                # repr: NaN is not equal to NaN
                self._earlier |= {(row.step, k): repr(v) for k, v in row.metrics.items()}

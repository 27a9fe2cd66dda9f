"""The journal: exact, torn, superseded, and read on by a store that cannot take back."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import TransientError, UserError
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from trainer.run.journal import JournalWriter, NewNumbers, Row, read_journal, read_rows, superseded


def start(generation: int, resumed_at: int) -> Row:
    return Row(resumed_at, generation, 0.5, resumed_at=resumed_at)


def loss(step: int, generation: int, value: float) -> Row:
    return Row(step, generation, 1.5, {"train/loss": value})


def write(path: Path, *rows: Row) -> None:
    writer = JournalWriter(path)
    for row in rows:
        writer.put(row)
    writer.close()


@settings(deadline=None)
@given(st.lists(st.floats(width=64), min_size=1, max_size=20), st.floats(0, 2e9))
def test_floats_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float], at: float) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    write(path, *(Row(step, 1, at, {"train/loss": v}) for step, v in enumerate(values)))
    rows = read_journal(path)
    assert all(row.time == at for row in rows)
    for row, v in zip(rows, values, strict=True):
        back = row.metrics["train/loss"]
        assert struct.pack("d", back) == struct.pack("d", v) or (math.isnan(back) and math.isnan(v))


def test_line_has_the_promised_keys(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, start(1, 0), Row(100, 1, 2.25, {"train/loss": 3.5, "data/epoch/bücher": 1}))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "generation": 1, "time": 0.5, "metrics": {}, "resumed_at": 0},
        {"step": 100, "generation": 1, "time": 2.25, "metrics": {"train/loss": 3.5, "data/epoch/bücher": 1}},
    ]


def test_a_torn_line_is_ignored_and_cut_off(tmp_path: Path) -> None:
    """A line torn at any byte is ignored by readers and cut off by the next writer."""
    path = tmp_path / "metrics.jsonl"
    write(path, start(1, 0), loss(1, 1, 3.0), Row(2, 1, 1.5, {"x" * 70_000: 1.0}), loss(3, 1, 2.0))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in (
        0,
        1,
        ends[0] - 1,
        ends[0],
        ends[0] + 1,
        ends[1] - 1,
        ends[1] + 1,
        ends[2] - 2,
        ends[2],
        len(whole) - 1,
    ):
        path.write_bytes(whole[:size])
        complete = [row for row, _ in read_rows(path)]
        assert len(complete) == sum(end <= size for end in ends)
        write(path, loss(9, 1, 1.0))
        assert [row for row, _ in read_rows(path)] == [*complete, loss(9, 1, 1.0)]


def test_steps_done_again_count_by_the_newest_generation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        start(1, 0),
        *(loss(step, 1, step + 0.1) for step in (1, 2, 3, 4)),
        Row(2, 1, 1.6, {"val/loss": 9.5}),
        start(2, 2),
        loss(3, 2, 3.2),
        loss(4, 1, 99.0),  # a stranded process of the first start
        start(3, 2),
        Row(2, 3, 1.7, {"val/loss": 9.7}),
        loss(3, 3, 3.3),
    )
    rows = read_journal(path)
    assert [(r.step, r.generation) for r in rows] == [(1, 1), (2, 3), (3, 3)]
    assert [r.metrics for r in rows] == [
        {"train/loss": 1.1},
        {"train/loss": 2.1, "val/loss": 9.7},
        {"train/loss": 3.3},
    ]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"step": 1}', '{"step":1,"generation":1,"time":1,"metrics":[1]}'])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, start(1, 0))
    size = path.stat().st_size
    with path.open("a") as f:
        f.write(line + "\n")
    with pytest.raises(UserError, match=rf"metrics.jsonl: the line at byte {size} is no journal row"):
        read_journal(path)


def test_flush_returns_when_all_rows_are_in_the_file(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "metrics.jsonl")
    for step in range(500):
        writer.put(loss(step, 1, 1.0))
    writer.flush()
    assert len(read_journal(tmp_path / "metrics.jsonl")) == 500
    writer.close()


def test_a_full_disk_is_an_error_and_leaves_a_journal(tmp_path: Path) -> None:
    """A limit on the file's size stands for the disk: the kernel writes a part of a line, then refuses."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from tests.unit.trainer.run.test_journal import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "writer = JournalWriter(Path(sys.argv[1]))\n"
        "try:\n"
        "    for step in range(100): writer.put(loss(step, 1, 1.0))\n"
        "    writer.flush()\n"
        "except UserError as e: print(e)\n"
    )
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("metrics cannot be written: "), done.stderr
    assert path.stat().st_size == 1000
    rows = read_journal(path)
    assert [row.step for row in rows] == list(range(len(rows)))
    write(path, loss(100, 1, 1.0))
    assert len(read_journal(path)) == len(rows) + 1


def test_kill_loses_no_row_that_was_written(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.trainer.run.test_journal import *\n"
        "writer = JournalWriter(Path(sys.argv[1]))\n"
        "for step in range(200): writer.put(loss(step, 1, 1.0))\n"
        "writer.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == -signal.SIGKILL
    assert len(read_journal(path)) == 200


def naive_news(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Brute force: a number is left out where the newest earlier row of its step had the same, before this start."""
    out = []
    seen: dict[tuple[int, str], float] = {}
    older: dict[tuple[int, str], float] = {}
    for row, _ in read_rows(path):
        if row.resumed_at is not None:
            older = {k: v for k, v in seen.items() if k[0] > row.step}
        out.append((row.step, {k: v for k, v in row.metrics.items() if older.get((row.step, k)) != v}))
        seen |= {(row.step, k): v for k, v in row.metrics.items()}
    return out


def test_reading_on_leaves_out_what_a_step_done_again_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [start(1, 0), *(Row(s, 1, 1.0, {"loss": s / 3, "speed": 10.0 + s}) for s in range(1, 7))]
    rows += [start(2, 3), *(Row(s, 2, 2.0, {"loss": s / 3, "speed": 20.0 + s}) for s in range(4, 6))]
    rows += [start(3, 1), *(Row(s, 3, 3.0, {"loss": s / 3, "speed": 20.0 + s}) for s in range(2, 9))]
    write(path, *rows)
    expected = naive_news(path)
    ends = [0, *(end for _, end in read_rows(path))]
    assert [m for s, m in expected if s == 4] == [{"loss": 4 / 3, "speed": 14.0}, {"speed": 24.0}, {}]
    news = NewNumbers(path)
    for i in [0, 4, 8, 9, 10, 2, 12, len(rows)]:  # a reader that starts anywhere, and falls back after a failure
        assert [(row.step, row.metrics) for row, _ in news.rows(ends[i])] == expected[i:]
        assert [(row.step, row.metrics) for row, _ in NewNumbers(path).rows(ends[i])] == expected[i:]


def test_rows_are_fsynced_within_seconds_without_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are made safe within seconds, also if nobody flushes and no row follows."""
    path, safe = tmp_path / "metrics.jsonl", []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (real(fd), safe.append(path.stat().st_size)))
    writer = JournalWriter(path)
    for step in range(50):
        writer.put(loss(step, 1, 1.0))
    deadline = time.monotonic() + 60
    while not safe or safe[-1] < path.stat().st_size or len(list(read_rows(path))) < 50:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(safe) < 25  # once for many rows, not once for each
    writer.close()


def test_superseded_ranges_are_the_steps_left_out(tmp_path: Path) -> None:
    """Against the reading that counts: a logged step is in a range of its start, or in the run as it counts."""
    draw = random.Random(seeded())
    for turn in range(50):
        path, at = tmp_path / f"{turn}.jsonl", 0
        rows: list[Row] = []
        for generation in range(1, draw.randint(2, 6)):
            begin = draw.randint(0, at)
            at = begin + draw.randint(0, 6)
            rows += [start(generation, begin), *(loss(s, generation, 1.0) for s in range(begin + 1, at + 1))]
        write(path, *rows)
        ranges = superseded(rows)
        told = {(r["generation"], s) for r in ranges for s in range(r["from_step"], r["to_step"] + 1)}
        logged = {(row.generation, row.step) for row in rows if row.resumed_at is None}
        counts = {(row.generation, row.step) for row in read_journal(path)}
        assert logged - told == counts and all(r["from_step"] <= r["to_step"] for r in ranges)


def test_a_full_disk_under_the_journal_may_pass(tmp_path: Path) -> None:
    """As one under a checkpoint: the supervisor tries again."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    journal = JournalWriter(tmp_path / "metrics.jsonl")
    journal.put(Row(1, 1, 1.0, {"train/loss": 1.0}))
    with pytest.raises(TransientError, match=r"metrics cannot be written: .*No space left on device"):
        journal.close()


def test_what_is_not_finite_is_json_for_every_reader(tmp_path: Path) -> None:
    """node and orjson refuse NaN and Infinity; the numbers are read back all the same."""
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    write(tmp_path / "j", Row(1, 1, 1.0, metrics))
    body = json.loads((tmp_path / "j").read_text(), parse_constant=pytest.fail)
    assert body["metrics"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 1.5}
    [(row, _)] = read_rows(tmp_path / "j")
    assert str(row.metrics) == str(metrics)

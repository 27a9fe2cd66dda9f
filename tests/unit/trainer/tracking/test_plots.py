"""The curves: the points that are drawn of a journal, and the picture."""

from __future__ import annotations

import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from trainer.run.folder import RunFolder
from trainer.run.journal import JournalWriter, Row
from trainer.tracking.plots import POINTS, points


def rows_of(n: int) -> list[Row]:
    draw = random.Random(seeded())
    return [Row(step, 1, 1.0, {"train/loss": 1 + draw.random()}) for step in range(1, n + 1)]


@pytest.mark.parametrize("n", [0, 1, POINTS - 1, POINTS, POINTS + 1, 3 * POINTS, 3 * POINTS + 1, 3 * POINTS + 2])
def test_a_long_line_is_thinned_and_keeps_its_ends(n: int) -> None:
    """The first and the last point stay; a short line stays whole."""
    rows = rows_of(n)
    found = points(rows, "train/loss")
    every = [(row.step, row.metrics["train/loss"]) for row in rows]
    assert len(found) <= POINTS + 1 and set(found) <= set(every) and len(set(found)) == len(found)
    assert found[:1] == every[:1] and found[-1:] == every[-1:]
    assert n > POINTS or found == every


def test_numbers_that_are_none_are_left_out() -> None:
    rows = [
        Row(1, 1, 1.0, {"x": math.nan}),
        Row(2, 1, 1.0, {"x": 2.0}),
        Row(3, 1, 1.0, {"x": math.inf}),
        Row(4, 1, 1.0),
    ]
    assert points(rows, "x") == [(2, 2.0)]


def draw(folder: RunFolder, name: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "trainer.tracking.plots", str(folder.root), name]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_curves_are_drawn_in_a_process_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the tracking extra is not installed")
    folder = RunFolder(tmp_path / "a run")
    folder.root.mkdir()
    assert draw(folder, "none yet").returncode == 0 and not folder.plots.exists()
    writer = JournalWriter(folder.metrics)
    for row in [Row(0, 1, 1.0, resumed_at=0), *rows_of(30), Row(10, 2, 1.0, resumed_at=10), *rows_of(20)[10:]]:
        writer.put(row)
    tasks = {f"task/t{i}/acc": i / 9 for i in range(9)} | {"task/t1/ppl": 99.0, "task/t1/acc_stderr": 0.1}
    writer.put(Row(20, 2, 1.0, {"val/loss": 1.5, "speed/tokens_per_s": math.inf, **tasks}))
    writer.close()
    done = draw(folder, "a $name_ with \\marks")
    assert done.returncode == 0, done.stderr
    drawn = sorted(folder.plots.iterdir())
    assert [path.name for path in drawn] == ["accuracy.png", "loss.png"]  # the others have no number to draw
    for png in map(Path.read_bytes, drawn):
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (990, 550)


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    done = draw(RunFolder(tmp_path), "x")
    assert done.returncode == 1 and done.stderr.startswith(f"{tmp_path}/metrics.jsonl: the line at byte 0"), done.stderr

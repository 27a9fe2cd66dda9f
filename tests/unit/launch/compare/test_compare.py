"""launch.compare over real run folders: what differs, the curves with their hours and tokens, and others' files."""

from __future__ import annotations

import math
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from launch.compare import curves
from launch.compare.compare import compare, split
from launch.compare.curves import LOSSES, read_curves
from launch.config import CompareConfig
from tests.helpers.ranks import ROOT
from trainer.run.folder import RunFolder
from trainer.run.journal import JournalWriter, Row
from trainer.tracking.plots import check_picture

HOUR = 3600.0


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two copies of a run that an older version made: the second has another rate, and goes on in a second start."""
    first, second = (Path(shutil.copytree(ROOT / "tests/data/before/run", tmp_path / name)) for name in ("a", "b"))
    config = (second / "config.yaml").read_text()
    assert "  lr: 0.003\n" in config and "  norm: pre\n" in config
    (second / "config.yaml").write_text(config.replace("  lr: 0.003\n", "  lr: 0.01\n").replace("  norm: pre\n", ""))
    started = read_curves(second / "metrics.jsonl").points["train/loss"]
    assert [point.steps for point in started] == [1, 2, 3, 4]
    writer = JournalWriter(second / "metrics.jsonl")
    writer.put(Row(3, 2, 9e9, resumed_at=3))
    writer.put(Row(4, 2, 9e9 + 1 * HOUR, {"train/loss": 2.0, "data/tokens": 1024.0}))
    writer.put(Row(5, 2, 9e9 + 2 * HOUR, {"val/loss": 2.5}))
    writer.put(Row(6, 2, 9e9 + 3 * HOUR, {"train/loss": math.nan, "data/tokens": 2048.0}))
    writer.close()
    return [first, second]


def told(capsys: pytest.CaptureFixture[str], *folders: Path, output: Path | None = None) -> list[str]:
    compare(CompareConfig(output=str(output) if output else None), [str(folder) for folder in folders])
    return capsys.readouterr().out.splitlines()


def test_keys_that_differ_are_a_table(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split() for line in told(capsys, *runs)] == [
        ["a", "b"],
        ["model.norm", "pre", "-"],
        ["optim.lr", "0.003", "0.01"],
    ]
    third = Path(shutil.copytree(runs[0], runs[0].parent / "deep/a"))
    header = told(capsys, *runs, third)[0]
    assert header.split() == [str(path) for path in (*runs, third)]  # two of them are named a
    assert told(capsys, runs[0], third) == ["the configs are the same"]
    (third / "config.yaml").write_text("x: &a [1]\n")
    lines = told(capsys, runs[1], third)
    assert len(lines) == 1 and "config.yaml cannot be read: line 1: a YAML anchor" in lines[0]


def test_a_later_start_supersedes_and_its_pause_takes_no_hours(runs: list[Path]) -> None:
    alone, both = (read_curves(run / "metrics.jsonl").points for run in runs)
    train, before = both["train/loss"], alone["train/loss"]
    assert train[:3] == before[:3] and [(p.steps, p.loss) for p in train[3:]] == [(4, 2.0)]  # nan is no point
    assert train[3].hours == pytest.approx(before[3].hours + 1) and train[3].tokens == 1024
    [val] = both["val/loss"]
    assert (val.steps, val.tokens, val.loss) == (5, 1536.0, 2.5) and val.hours == pytest.approx(before[3].hours + 2)


def test_damage_is_told_and_the_rest_is_drawn(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = runs[0] / "metrics.jsonl"
    whole = read_curves(path)
    evil = ("\x1b[2J", "[" * 9999, '{"step":1e999}', '{"step":-1,"generation":1,"time":0,"metrics":{}}')
    with path.open("a") as f:
        f.writelines(f"{line}\n" for line in (*evil, '{"step":9,"generation":1,"time":"nan","metrics":{}}'))
        f.write('{"step": torn')
    found = read_curves(path)
    assert found.points == whole.points and found.problems == [f"{path}: 5 lines are damaged: the rest is shown"]
    path.write_text("\x1b[2J\n")
    (runs[1] / "metrics.jsonl").unlink()
    os.mkfifo(runs[1] / "metrics.jsonl")
    pytest.importorskip("matplotlib", reason="the tracking extra is not installed")
    output = runs[0].parent / "c.png"
    assert told(capsys, *runs, output=output)[-3:] == [
        f"{path}: 1 lines are damaged: the rest is shown",
        f"{runs[1]}/metrics.jsonl cannot be read: {runs[1]}/metrics.jsonl: not a regular file: the rest is shown",
        "no curve: none of these runs has logged a loss",
    ]
    assert not output.exists()


def test_of_a_long_journal_the_beginning_is_read(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = runs[0] / "metrics.jsonl"
    monkeypatch.setattr(curves, "JOURNAL_BYTES", path.stat().st_size - 10)
    assert len(read_curves(path).points["train/loss"]) == 4 and not read_curves(path).problems
    with path.open("ab") as f:
        f.truncate(64 << 30)  # a hole, which takes no room
    found = read_curves(path)
    assert len(found.points["train/loss"]) == 4 and "its beginning alone is drawn" in found.problems[-1]


def test_the_picture_has_a_row_of_panels_for_each_loss(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the tracking extra is not installed")
    output, strange = runs[0].parent / "c.png", runs[0].rename(runs[0].parent / "_$x_")
    assert told(capsys, strange, runs[1], output=output)[-1] == f"drawn: {output}"
    assert struct.unpack(">II", output.read_bytes()[16:24]) == (1430, 110 * 4 * len(LOSSES) + 55)
    check_picture(output, "output")  # its own may be replaced


@pytest.mark.parametrize("what", ["text", "png", "folder", "link", "dangling", "fifo"])
def test_a_file_of_others_is_not_drawn_over(runs: list[Path], what: str) -> None:
    pytest.importorskip("matplotlib", reason="the tracking extra is not installed")
    output = runs[0].parent / "mine.png"
    if what == "folder":
        output.mkdir()
    elif what == "fifo":
        os.mkfifo(output)
    elif what in ("link", "dangling"):
        output.symlink_to(runs[0] / ("config.yaml" if what == "link" else "none"))
    else:
        output.write_bytes((ROOT / "docs/demo.png").read_bytes() if what == "png" else b"years of work")
    before = output.lstat()
    with pytest.raises(UserError, match=r"mine\.png: it is there and no picture of ours: move it away, or"):
        compare(CompareConfig(output=str(output)), [str(run) for run in runs])
    after = output.lstat()
    for name in ("st_mode", "st_ino", "st_size", "st_mtime_ns"):  # reading it may move its time of access
        assert getattr(after, name) == getattr(before, name)


def test_mistakes_are_one_line(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert split(["a", "output=c/d.png", "runs/lr=1", "--cfg", "job"]) == (
        ["a", "runs/lr=1"],
        ["output=c/d.png", "--cfg", "job"],
    )
    (runs[0].parent / "empty").mkdir()
    for folders, words in (
        ([runs[0], runs[0]], "1 run folders are given, compare takes two or more"),
        ([runs[0], runs[0] / "none"], "none: no such folder"),
        ([runs[0], runs[0].parent / "empty"], "empty has no config.yaml and no metrics.jsonl: give the run.dir"),
    ):
        with pytest.raises(UserError, match=words):
            compare(CompareConfig(output=None), [str(folder) for folder in folders])
    for output, words in ((runs[0] / "no/c.png", "is no folder"), (runs[0] / "c.png", "")):
        if not words:
            monkeypatch.setitem(sys.modules, "matplotlib", None)
            words = (
                r"matplotlib is not installed \(pip install gradus\[tracking\]\): give another output, or output=null"
            )
        with pytest.raises(UserError, match=words):
            compare(CompareConfig(output=str(output)), [str(run) for run in runs])
    compare(CompareConfig(output=None), [str(run) for run in runs])  # the table needs no matplotlib
    assert not list(RunFolder(runs[0]).root.glob("*.png"))

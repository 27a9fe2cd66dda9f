"""The pictures of many evaluations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.curves import Point, draw_curves, shots_lines, steps_lines

BASE = {"limit": None, "seed": 0, "max_new_tokens": None}


def write(root: Path, step: int, results: dict[str, Any], *, age: int = 0, **settings: Any) -> Path:
    folder = root / f"step-{step:08d}.gen-0001-0a1b2c3d"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"report-{len(list(folder.iterdir())):08d}.json"
    checkpoint = f"/runs/a/checkpoints/step-{step:08d}.gen-0001"
    path.write_text(json.dumps({"results": results, "checkpoint": checkpoint, "settings": {**BASE, **settings}}))
    os.utime(path, (1000 - age, 1000 - age))
    return path


def result(acc: float, shots: int = 0, stderr: float | None = 0.1) -> dict[str, Any]:
    return {"n": 9, "acc": acc, "acc_stderr": stderr, "acc_per_token": 0.5} | ({"shots": shots} if shots else {})


def test_figures_over_demonstrations_are_of_one_checkpoint(tmp_path: Path) -> None:
    report = write(tmp_path, 20, {"piqa": result(0.5), "copa": result(0.9)}, shots=0)
    assert shots_lines(report) == {}
    write(tmp_path, 20, {"piqa": result(0.7, 5)}, shots=5)
    write(tmp_path, 20, {"piqa": result(0.6, 1)}, shots=1)
    write(tmp_path, 20, {"piqa": result(0.1, 2)}, shots=2, limit=10)  # of other questions
    write(tmp_path, 10, {"piqa": result(0.2, 3)}, shots=3)
    line = [Point(0, 0.5, 0.1), Point(1, 0.6, 0.1), Point(5, 0.7, 0.1)]
    assert shots_lines(report) == {"acc": {"piqa": line}}


def test_figures_over_steps_are_of_all_checkpoints(tmp_path: Path) -> None:
    report = write(tmp_path, 20, {"piqa": result(0.5, 2), "wikitext2": {"n": 1, "ppl": 30.0}}, shots=2)
    write(tmp_path, 10, {"piqa": result(0.1, 2)}, shots=2, age=9)
    write(tmp_path, 10, {"piqa": result(0.4, 2)}, shots=2)  # measured again: the newer counts
    write(tmp_path, 30, {"piqa": result(0.9)}, shots=0)
    write(tmp_path, 40, {"wikitext2": {"n": 1, "ppl": 20.0}}, shots=2)
    assert {k: {t: [p[:2] for p in line] for t, line in v.items()} for k, v in steps_lines(report).items()} == {
        "acc": {"piqa": [(10, 0.4), (20, 0.5)]},
        "ppl": {"wikitext2": [(20, 30.0), (40, 20.0)]},
    }


def test_pictures_are_drawn_where_there_are_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the tracking extra is not installed")
    report = write(tmp_path, 20, {"a_$task$": result(0.5, stderr=None), "b": {"n": 1, "ppl": 30.0}}, shots=0)
    assert draw_curves(report) == []
    write(tmp_path, 20, {"a_$task$": result(0.7, 5)}, shots=5)
    write(tmp_path, 10, {"a_$task$": result(0.2), "b": {"n": 1, "ppl": 40.0}}, shots=0)
    assert draw_curves(report) == [report.with_name("shots.png"), tmp_path / "steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in draw_curves(report))

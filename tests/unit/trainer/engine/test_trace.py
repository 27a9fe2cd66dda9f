"""A trace holds the steps that were asked for, once they are all made; else a line says that there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer.engine.trace import StepTrace


def test_a_trace_begins_anew_when_its_first_step_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a rollback makes it do."""
    path, written = tmp_path / "profile" / "steps-2-3.json", list[str]()
    trace = StepTrace((2, 3), path, lambda: written.append("written"))
    for step in (1, 2, 1, 2, 3, 4):
        with trace.step(step):
            torch.ones(step) + 1
    trace.close()
    names = [e.get("name") for e in json.loads(path.read_text())["traceEvents"]]
    assert {name for name in names if str(name).startswith("step ")} == {"step 2", "step 3"}
    assert written == ["written"] and [p.name for p in path.parent.iterdir()] == [path.name]
    assert capsys.readouterr().out == f"profile=2-3: {path}, for https://ui.perfetto.dev\n"


@pytest.mark.parametrize("steps", [(2, 3, 4), (1, 2), ()])
def test_a_start_without_all_steps_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: tuple[int, ...]
) -> None:
    trace = StepTrace((1, 3), tmp_path / "trace.json", lambda: None)
    for step in steps:
        with trace.step(step):
            pass
    trace.close()
    trace.close()
    assert capsys.readouterr().out == "profile=1-3: this start has not made all these steps: no trace\n"
    assert list(tmp_path.iterdir()) == []

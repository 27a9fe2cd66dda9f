"""`python -m trainer.evaluate`: one report for every layout and batch size, and for a start that was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.evaluation_data import Documents, random_checkpoint, write_rows
from tests.helpers.ranks import ROOT, free_port, rank_env
from tests.helpers.seeds import seeded

Process = subprocess.Popen[str]
LAYOUTS = {"dp2": (2, ["batch_size=1"]), "tp2": (2, ["tp=2", "batch_size=8"]), "one": (1, ["batch_size=32"])}


def described(folder: Path) -> list[str]:
    """A task of each kind, of random documents."""
    seed = seeded()
    documents = Documents(seed)
    rows = {"piqa": documents.piqa(14), "lambada": documents.lambada(14), "nq": documents.nq_open(6)}
    data = {name: {"files": {f"{name}.jsonl": None}, "format": "jsonl"} for name in rows}
    for name, some in rows.items():
        write_rows(folder / f"{name}.jsonl", some)
    choices = {"context": "{{ goal }}", "options": ["{{ sol1 }}", "{{ sol2 }}"], "correct": "label"}
    completion = {"context": "{{ text.rsplit(' ', 1)[0] }}", "continuation": " {{ text.rsplit(' ', 1)[1] }}"}
    generation = {"context": "{{ question }}", "answers": "answer", "metric": "f1", "max_new_tokens": 6}
    tasks = {
        "choose": {"data": data["piqa"], "choices": choices, "shots": 2},
        "complete": {"data": data["lambada"], "completion": completion},
        "count": {"data": data["lambada"], "perplexity": {"unit": "words"}},
        "write": {"data": data["nq"], "generation": generation},
    }
    for name, body in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"about": "x", **body}), encoding="utf-8")
    return [str(folder / f"{name}.yaml") for name in tasks]


DIES = """
import os, runpy, signal
from trainer.evaluation.journal import Journal

add, kept = Journal.add, []

def add_and_die(self, rows):
    add(self, rows)
    kept.extend(rows)
    if len(kept) >= 20:
        with next(self.folder.iterdir()).open("ab") as f:
            f.write(b'{"sha": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = add_and_die
runpy.run_module("trainer.evaluate", run_name="__main__", alter_sys=True)
"""


def start(ranks: int, *overrides: str, module: tuple[str, str] = ("-m", "trainer.evaluate")) -> list[Process]:
    port, argv = free_port(), [sys.executable, *module, *overrides]
    how: dict[str, Any] = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen(argv, env=rank_env(r, ranks, port), **how) for r in range(ranks)]


def ended(processes: list[Process]) -> dict[str, Any]:
    """The one line of the first rank; the others print none."""
    told = [p.communicate(timeout=250) for p in processes]
    assert all(p.returncode == 0 for p in processes), [err[-2000:] for _, err in told]
    assert [len(out.splitlines()) for out, _ in told] == [1] + [0] * (len(told) - 1)
    report: dict[str, Any] = json.loads(told[0][0])
    return report


@pytest.mark.slow
def test_a_report_does_not_depend_on_layout_or_batch(tmp_path: Path) -> None:
    """Data-parallel, tensor-parallel, alone; batches of 1, 8, 32: each figure within 1e-6 of the others, a perplexity
    within 1e-5: it is the exponential of some ten nats."""
    _, checkpoint = random_checkpoint(tmp_path, 96, seeded())
    tasks = ",".join(described(tmp_path))
    common = [f"checkpoint={checkpoint}", f"tasks=[{tasks}]", f"task_data={tmp_path}", "json=true"]
    found = {
        name: ended(start(ranks, *common, *how, f"output={tmp_path / name}")) for name, (ranks, how) in LAYOUTS.items()
    }
    one = found["one"]["results"]
    assert {Path(name).stem for name in one} == {"choose", "complete", "count", "write"}
    for report in found.values():
        for name, figures in report["results"].items():
            for metric, value in figures.items():
                expected = one[name][metric]
                near = 1e-5 if metric.startswith("ppl") else 1e-6
                close = pytest.approx(expected, rel=near) if isinstance(value, float) else expected
                assert value == close, (name, metric)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    """Killed by -9 in mid-line: the same command computes the rest alone, and gives the report of one left alone."""
    _, checkpoint = random_checkpoint(tmp_path, 96, seeded())
    tasks = ",".join(described(tmp_path))
    common = [f"checkpoint={checkpoint}", f"tasks=[{tasks}]", f"task_data={tmp_path}", "json=true", "batch_size=1"]
    whole = ended(start(1, *common, f"output={tmp_path / 'whole'}"))
    (process,) = start(1, *common, f"output={tmp_path / 'killed'}", module=("-c", DIES))
    _, err = process.communicate(timeout=250)
    assert process.returncode == -signal.SIGKILL, err[-2000:]
    assert 20 <= len(journaled(tmp_path / "killed")) < len(journaled(tmp_path / "whole"))
    again = ended(start(1, *common, f"output={tmp_path / 'killed'}"))
    after = journaled(tmp_path / "killed")
    assert len(after) == len(set(after)) == len(journaled(tmp_path / "whole"))  # none twice
    assert again["results"] == whole["results"]
    (report,) = (tmp_path / "killed").rglob("report-*.json")
    assert json.loads(report.read_text())["results"] == whole["results"]


def journaled(output: Path, folder: str = "journal") -> list[str]:
    """The hash of each whole line."""
    lines = [line for path in output.rglob(f"{folder}/*.jsonl") for line in path.read_text().split("\n")[:-1]]
    return [json.loads(line)["sha"] for line in lines if line.endswith("}")]

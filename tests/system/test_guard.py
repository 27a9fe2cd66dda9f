"""Bad steps planted in real data: skipped, on repeat gone back from and jumped over, and the same after any kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import ROOT
from tests.system.mixtures import state
from tests.system.plants import make_plants, windows_of
from tests.system.runs import finish, pretrain, start
from tests.system.test_resume import EXACT, weights
from trainer.run.journal import Row, read_journal, read_rows

GUARD = (
    "guard.spike_z=8",
    "guard.window=8",
    "guard.min_steps=8",
    "guard.skips=2",
    "guard.within=8",
    "optim.schedule.kind=constant",
    "checkpoint.keep=1",
)
NAN = "tests.system.nan_batches"


def run(run_dir: Path, *overrides: str, ranks: int = 2, entry: str = "trainer.pretrain") -> None:
    ended = finish(start(run_dir, *overrides, ranks=ranks, entry=entry))
    assert all(code == 0 for code, _ in ended), "\n".join(err[-3000:] for _, err in ended)


def story(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    keys = (*EXACT, "guard/skipped")
    rows = read_journal(run_dir / "metrics.jsonl")
    return [(row.step, {k: v for k, v in row.metrics.items() if k in keys}) for row in rows]


def events(run_dir: Path) -> list[tuple[Any, ...]]:
    """(step, why, did, back to, jumped) of each."""
    found = state(run_dir)["guard"]["events"]
    return [(e["step"], e["why"], e["did"], e.get("to"), e.get("jumped")) for e in found]


def fed(run_dir: Path, steps: int) -> set[tuple[int, int]]:
    """(shard, first token) of each window that the run was trained on, by `python -m data_pipeline.order`."""
    argv = [sys.executable, "-m", "data_pipeline.order", f"checkpoint={run_dir}", "json=true", f"steps=0:{steps}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    found = set()
    for line in map(json.loads, done.stdout.splitlines()):
        document, first, _ = line["spans"][0]
        shard, number = map(int, document.split("-"))
        found.add((shard, 100 * number + first))
    return found


def test_spikes_are_skipped_then_gone_back_from_and_jumped_over(tmp_path: Path) -> None:
    how = (*GUARD, "max_steps=27")
    data = make_plants(tmp_path / "data", {22: "noise", 24: "noise"}, 1, *how)
    pretrain(tmp_path / "run", f"data.path={data}", *how)
    spike = "loss spike"
    assert events(tmp_path / "run") == [
        (22, spike, "skipped", None, None),
        (24, spike, "skipped", None, None),
        (24, spike, "rolled back", 20, [160, 200]),
    ]
    told = state(tmp_path / "run")
    assert [(s["step"], s["position"]) for s in told["data"]["ledger"]] == [(0, 0), (20, 160), (20, 200)]
    assert told["optimizer_step"] == told["step"] == 27 and told["guard"]["skipped"] == 2
    skipped = [row for row, _ in read_rows(tmp_path / "run/metrics.jsonl") if "guard/skipped" in row.metrics]
    assert [(row.step, row.generation) for row in skipped] == [(23, 1), (25, 1)]
    assert not any("guard/skipped" in numbers for _, numbers in story(tmp_path / "run")), "these steps were done again"
    windows = fed(tmp_path / "run", 27)
    assert len(windows) == 27 * 8
    assert all(windows.isdisjoint(windows_of(data, step, *how)) for step in range(20, 25))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The last validation loss of a run on the same data without plants."""
    root = tmp_path_factory.mktemp("clean")
    run(root / "run", f"data.path={make_plants(root / 'data', {}, 1)}", *GUARD, "max_steps=40")
    return story(root / "run")[-1][1]["val/loss"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_spikes_repeats_itself_after_kills(tmp_path: Path) -> None:
    """Killed right after a skip, right after going back, and after the next checkpoint: the same story, to the bit.

    It ends where a run on clean data does: the seed alone makes 0.06 of it, and without the guard it is 0.08 off.
    """
    how = (*GUARD, "max_steps=36", "model.dropout=0.1", "eval.every=10", "precision=bf16")
    data = make_plants(tmp_path / "data", {22: "noise", 25: "noise", 33: "noise"}, 1, *how)
    run(tmp_path / "clean", f"data.path={make_plants(tmp_path / 'no plants', {}, 1)}", *how)
    how = (f"data.path={data}", *how)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, *how)
    assert [e[2:] for e in events(whole)] == [
        ("skipped", None, None),
        ("skipped", None, None),
        ("rolled back", 20, [160, 208]),
        ("skipped", None, None),
    ]
    last, clean = (story(tmp_path / name)[-1][1]["val/loss"] for name in ("whole", "clean"))
    assert abs(last - clean) < 0.05
    kill_when(killed, how, lambda rows: any("guard/skipped" in r.metrics for r in rows), 0)
    assert state(killed)["step"] <= 24
    kill_when(killed, how, lambda rows: any(r.generation == 3 for r in rows), 1)
    assert state(killed)["guard"]["events"] == [] and state(killed)["step"] == 20
    kill_when(killed, how, lambda rows: any(r.generation == 5 and r.step == 30 for r in rows), 1)
    run(killed, *how)
    assert story(killed) == story(whole)
    assert weights(killed) == weights(whole)
    assert [state(killed)[k] for k in ("guard", "data", "best_val_loss")] == [
        state(whole)[k] for k in ("guard", "data", "best_val_loss")
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nan_batches_are_jumped_over_from_the_beginning(tmp_path: Path, clean: float) -> None:
    """The first before any checkpoint: back to the beginning; the second to a checkpoint."""
    how = (*GUARD, "max_steps=40", "parallel.zero_stage=3")
    data = make_plants(tmp_path / "data", {2: "marker", 3: "marker", 22: "marker", 25: "marker"}, 1, *how)
    run(tmp_path / "run", f"data.path={data}", *how, entry=NAN)
    back = [e for e in events(tmp_path / "run") if e[2] == "rolled back"]
    assert back == [(3, "non-finite", "rolled back", 0, [0, 32]), (21, "non-finite", "rolled back", 16, [160, 208])]
    assert state(tmp_path / "run")["optimizer_step"] == 40
    assert abs(story(tmp_path / "run")[-1][1]["val/loss"] - clean) < 0.05
    windows = fed(tmp_path / "run", 40)
    assert len(windows) == 40 * 8
    assert all(windows.isdisjoint(windows_of(data, step, *how)) for step in (2, 3, 22, 25))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_guard_max_rollbacks_ends_the_run_with_a_report(tmp_path: Path) -> None:
    """The report names every rollback."""
    how = (*GUARD, "max_steps=40", "guard.max_rollbacks=1")
    data = make_plants(tmp_path / "data", dict.fromkeys((6, 7, 9, 10), "marker"), 1, *how)
    for code, err in finish(start(tmp_path / "run", f"data.path={data}", *how, ranks=2, entry=NAN)):
        said = err.strip().splitlines()[-1]
        assert code == 2 and said.startswith("error: guard: 2 bad steps among the last 8"), err
        assert "step 7 (windows from 56, non-finite, loss " in said and "back to step 4, over windows 32 to 64" in said
        assert "optim.lr" in said and "data_pipeline.order" in said and "guard.max_rollbacks" in said


def kill_when(run_dir: Path, how: tuple[str, ...], seen: Callable[[list[Row]], bool], rank: int) -> None:
    """Start the run, and SIGKILL one rank as soon as the journal shows what is waited for."""
    processes, journal = start(run_dir, *how, ranks=2), run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    try:
        while not (journal.exists() and seen([row for row, _ in read_rows(journal)])):
            assert all(p.poll() is None for p in processes), processes[0].communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        processes[rank].kill()
        finish(processes)
    finally:
        for p in processes:
            p.kill()

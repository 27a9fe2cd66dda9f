"""launch.submit on this machine, as a user types it: two gloo ranks train, are resumed, and how they end is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema import load
from tests.helpers.http_server import wait_for
from tests.helpers.ranks import ROOT
from tests.system.runs import TINY, make_data
from trainer.config.pretrain import PretrainConfig
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal

LEFT = ("cluster=local", "cluster.gpu=cpu", "cluster.gpus_per_node=2", "max_restarts=0")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def submit(left: list[str], right: list[str]) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launch.submit", *LEFT, *left, "--", *TINY, *right]
    return subprocess.run(argv, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_on_two_ranks_resumes_when_submitted_again(tmp_path: Path) -> None:
    data, root = make_data(tmp_path / "data"), tmp_path / "a run $(x)"
    left = ["run.name=it's", f"run.dir={root}"]
    for steps, launcher in ((6, "torchrun"), (10, "deepspeed")):
        done = submit([*left, f"cluster.local.launcher={launcher}"], [f"data.path={data}", f"max_steps={steps}"])
        assert done.returncode == 0, done.stderr[-3000:]
    rows = read_journal(root / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, 11))
    latest = RunFolder(root).latest()
    assert latest is not None and latest.name == "step-00000010.gen-0002"
    assert RunFolder.state(latest)["layout"]["dp"] == 2
    submitted = load(PretrainConfig, [f"frozen={root}/submit/0002/config.yaml"])
    assert load(PretrainConfig, [f"frozen={root}/config.yaml"]) == submitted  # what ran is what was submitted
    assert "resumes at step 6 of 10" in done.stdout
    code = json.loads((root / "submit/0002/code.json").read_text())
    assert code["packages"]["torch"] and "max_steps=10" in code["argv"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_of_a_sweep_are_trained_one_after_the_other(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    left = ["run.name=s", f"run.dir={tmp_path}/s", "sweep=[['optim.lr=1e-3'],['optim.lr=1e-2']]"]
    done = submit(left, [f"data.path={data}", "max_steps=4"])
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[row.metrics["train/loss"] for row in read_journal(tmp_path / f"s-{i}/metrics.jsonl")] for i in (0, 1)]
    assert len(losses[0]) == len(losses[1]) == 4
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]  # the same start, other rates


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cluster_env_reaches_the_ranks_and_exit_codes_come_back(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    left = [f"run.dir={tmp_path}/run", "cluster.env.DS_ACCELERATOR=$(none such)"]
    done = submit(left, [f"data.path={data}", "max_steps=4"])
    assert done.returncode == 1 and "$(none such)" in done.stderr and RunFolder(tmp_path / "run").latest() is None


def foreground(*commands: str) -> list[str]:
    code = "import sys; from pathlib import Path; from launch.submit import foreground;"
    code += f"sys.exit(foreground([[sys.executable, '-c', c] for c in {list(commands)!r}], Path.cwd()))"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(("ends", "code"), [((0, 0), 0), ((7, 0), 7), ((0, 85), 85), ((3, 4), 3), ((-9, 0), 137)])
def test_the_exit_code_is_that_of_the_first_run_that_failed(ends: tuple[int, ...], code: int) -> None:
    each = [
        f"import os; print('ran', flush=True); os._exit({n}) if {n} >= 0 else os.kill(os.getpid(), {-n})" for n in ends
    ]
    done = subprocess.run(foreground(*each), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (code, "ran\n" * len(ends)), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_goes_on_to_the_run_and_no_other_is_started(number: signal.Signals, tmp_path: Path) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{signal.Signals(number).name} is switched off here, as nohup does")
    arrives = signal.SIGTERM if number == signal.SIGHUP else number
    waits = f"import signal, time, sys; signal.signal({int(arrives)}, lambda *a: sys.exit(85)); "
    waits += f"open({str(tmp_path / 'up')!r}, 'w'); time.sleep(100)"
    process = subprocess.Popen(foreground(waits, f"open({str(tmp_path / 'second')!r}, 'w')"), cwd=ROOT, env=ENV)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 85
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "second").exists()


def test_a_signal_as_the_last_run_ends_well_changes_nothing(tmp_path: Path) -> None:
    waits = f"import os, signal; signal.signal({int(signal.SIGTERM)}, lambda *a: os._exit(0)); "
    waits += f"open({str(tmp_path / 'up')!r}, 'w'); signal.pause()"
    process = subprocess.Popen(foreground(waits), cwd=ROOT, env=ENV)
    try:
        wait_for(lambda: (tmp_path / "up").exists(), 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_usr1_saves_and_ends_with_85_through_every_layer(tmp_path: Path) -> None:
    data, root = make_data(tmp_path / "data"), tmp_path / "run"
    right = [*TINY, f"data.path={data}", "max_steps=100000"]
    argv = [sys.executable, "-m", "launch.submit", *LEFT, f"run.dir={root}", "--", *right]
    process = subprocess.Popen(argv, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (root / "metrics.jsonl").exists() and len(read_journal(root / "metrics.jsonl")) > 2, 200)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(200) == 85
    finally:
        process.send_signal(signal.SIGTERM)  # nothing where it has ended
    latest = RunFolder(root).latest()
    assert latest is not None and RunFolder.state(latest)["step"] == read_journal(root / "metrics.jsonl")[-1].step

"""A signal to one rank: all ranks agree on a step, one checkpoint is published, and the run goes on from it exactly."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT, Process, free_port, rank_env
from tests.helpers.seeds import seeded
from tests.system.runs import TINY, finish, make_data, pretrain, start
from tests.system.supervised import rows, supervised
from tests.system.test_resume import story, weights
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal


def signal_at(processes: list[Process], run: Path, step: int, rank: int, number: int) -> None:
    """One rank gets the signal once `step` is logged."""
    deadline = time.monotonic() + 200
    journal = run / "metrics.jsonl"
    while not (journal.exists() and any(row.step >= step for row in read_journal(journal))):
        dead = [p for p in processes if p.poll() is not None]
        assert not dead, f"a rank ended before step {step}: {dead[0].communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)
    processes[rank].send_signal(number)


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    """The run resumes bit for bit."""
    rng = random.Random(seeded())
    rank, at, steps = rng.randrange(2), rng.randrange(2, 8), 40
    common = (f"data.path={make_data(tmp_path / 'data')}", f"max_steps={steps}", "checkpoint.every_steps=0")
    run = tmp_path / "run"
    processes = start(run, *common, ranks=2)
    signal_at(processes, run, at, rank, signal.SIGUSR1)
    (code, err), (other, _) = finish(processes)
    assert (code, other) == (85, 85), err
    [saved] = RunFolder(run).published()
    step = int(saved.name[5:13])
    assert at < step < steps
    assert f"stopped by SIGUSR1 after step {step}, saved {saved}" in err
    assert [row.step for row in read_journal(run / "metrics.jsonl")][-1] == step
    pretrain(run, *common, ranks=2)
    pretrain(tmp_path / "whole", *common, ranks=2)
    assert story(run) == story(tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_ends_the_process_at_once(tmp_path: Path, number: int, code: int) -> None:
    """While torch is imported: rank 1 of two, which would wait for rank 0 for ever."""
    argv = [sys.executable, "-m", "trainer.pretrain", *TINY, f"run.dir={tmp_path / 'run'}"]
    argv += [f"data.path={make_data(tmp_path / 'data')}", "max_steps=3"]
    process = subprocess.Popen(argv, env=rank_env(1, 2, free_port()), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode == code
    assert err.splitlines()[-1].endswith("before the first step: nothing to save, nothing lost")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_agreement_a_signal_saves_nothing(tmp_path: Path) -> None:
    """The rank that got it ends; the last checkpoint stays."""
    asleep = random.randrange(2)
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=20", "checkpoint.every_steps=0", "watch.stop_s=2")
    planted = f"plant={asleep}:4:1000"
    run = tmp_path / "run"
    processes = start(run, *common, planted, ranks=2, entry="tests.helpers.planted")
    try:
        deadline = time.monotonic() + 200
        while not (run / "slept").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes[1 - asleep].send_signal(signal.SIGUSR1)
        [(code, err)] = finish([processes[1 - asleep]])
        processes[asleep].kill()
        finish(processes[asleep : asleep + 1])
    finally:
        for process in processes:
            process.kill()
    assert code == 87
    assert "SIGUSR1 after step 4, and the other ranks did not agree to stop within 2 s" in err.splitlines()[-1]
    assert RunFolder(run).published() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 85)])
def test_a_signal_to_the_restarter_saves_the_run_under_torchrun(tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run"
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=100000", "checkpoint.every_steps=0")
    process = supervised(run, *common, "watch.beat_s=0.1")
    try:
        signal_at([process], run, random.randrange(2, 9), 0, number)
        [(ended, err)] = finish([process])
    finally:
        process.kill()
    assert ended == code, err
    [saved] = RunFolder(run).published()
    assert read_journal(run / "metrics.jsonl")[-1].step == int(saved.name[5:13])
    started, exited = rows(run)
    assert (started["event"], exited["event"], exited["exit_code"]) == ("start", "exit", code)
    assert f"stopped by {signal.Signals(number).name} after step {int(saved.name[5:13])}, saved" in exited["cause"]

"""kill -9 of any rank at any moment, under the restarter: the run is the one that was never killed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.seeds import seeded
from tests.system.runs import finish, make_data, pretrain, start
from tests.system.supervised import rows, supervised
from tests.system.test_preemption import signal_at
from tests.system.test_resume import story, weights
from trainer.checkpoint.verify import check_files, verify
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import read_heartbeats
from trainer.run.journal import read_journal


def kill_a_rank(process: subprocess.Popen[str], run: Path, after: int, step: int, rng: random.Random) -> int:
    """SIGKILL to a rank of a start later than `after`, a moment after `step` is logged: it may be saving.

    Returns the number of that start.
    """
    folder, deadline = RunFolder(run), time.monotonic() + 200
    while True:
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before step {step}"
        logged = folder.metrics.exists() and any(row.step >= step for row in read_journal(folder.metrics))
        newest = folder.newest_generation()
        pids = [beat.pid for beat in read_heartbeats(folder.heartbeats) if beat.generation == newest]
        if logged and newest > after and len(pids) == 2:
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.05))
    os.kill(rng.choice(pids), signal.SIGKILL)
    return newest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_at_random_moments_change_no_bit(tmp_path: Path) -> None:
    """And leave no damaged checkpoint."""
    rng, kills, steps = random.Random(seeded()), 10, 200
    common = (f"data.path={make_data(tmp_path / 'data')}", f"max_steps={steps}", "model.dropout=0.1")
    saving = ("checkpoint.every_steps=2", "checkpoint.keep=1000", "watch.beat_s=0.05")
    pretrain(tmp_path / "whole", *common, ranks=2)
    run = tmp_path / "run"
    process = supervised(run, *common, *saving, direct=True)
    killed = 0
    try:
        for step in sorted(rng.sample(range(4, steps - 20), kills)):
            killed = kill_a_rank(process, run, killed, step, rng)
        [(code, err)] = finish([process], 400)
    finally:
        process.kill()
    assert code == 0, err[-3000:]
    assert [row["event"] for row in rows(run)].count("start") == kills + 1
    assert all(row["cause"] for row in rows(run) if row["event"] == "exit" and row["exit_code"])
    published = RunFolder(run).published()
    assert len(published) >= steps // 2
    for path in published:
        files = check_files(path)
        verify(path, files, list(files))
    slowest = [row.metrics for row in read_journal(run / "metrics.jsonl") if "speed/straggler" in row.metrics]
    assert slowest and all(m["speed/straggler"] >= 1 and m["speed/slowest_rank"] in (0, 1) for m in slowest)
    assert [step for step, _ in story(run)] == list(range(1, steps + 1))
    assert story(run) == story(tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_start_that_slept_publishes_nothing(tmp_path: Path) -> None:
    """Another start has taken the run over."""
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=30", "checkpoint.keep=1000")
    run = tmp_path / "run"
    first = start(run, *common, ranks=2)
    try:
        signal_at(first, run, 5, 0, signal.SIGSTOP)
        first[1].send_signal(signal.SIGSTOP)
        pretrain(run, *common, ranks=2)
        before, ends = [p.name for p in RunFolder(run).published()], weights(run)
        for process in first:
            process.send_signal(signal.SIGCONT)
        (code, err), (other, _) = finish(first)
    finally:
        for process in first:
            process.kill()
    assert code == other == 2, err
    assert [line for line in err.splitlines() if "error" in line.lower()] == [err.splitlines()[-1]], err
    assert "start 2 of this run has taken over, start 1 publishes nothing more" in err.splitlines()[-1]
    assert [p.name for p in RunFolder(run).published()] == before
    assert weights(run) == ends

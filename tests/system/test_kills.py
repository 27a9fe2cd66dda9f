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
from tests.system.plants import make_plants
from tests.system.runs import finish, make_data, pretrain, start
from tests.system.supervised import rows, supervised
from tests.system.test_guard import GUARD, events
from tests.system.test_preemption import signal_at
from tests.system.test_resume import story, weights
from trainer.checkpoint.verify import check_files, verify
from trainer.run.folder import RunFolder, step_of
from trainer.run.heartbeat import read_heartbeats
from trainer.run.journal import read_journal, read_rows

KILLS = int(os.environ.get("TEST_KILLS", "10"))
STEPS = 300
SPIKES = {150: "noise", 152: "noise"}  # after the second one the run goes back: it is step 153


def kill_a_rank(process: subprocess.Popen[str], run: Path, dead: set[int], step: int, rng: random.Random) -> None:
    """SIGKILL to a rank of a new start, a moment after `step` is logged by any; adds the start's ranks to `dead`."""
    folder, deadline = RunFolder(run), time.monotonic() + 600
    while True:
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before step {step}"
        logged = folder.metrics.exists() and any(row.step >= step for row, _ in read_rows(folder.metrics))
        beats = read_heartbeats(folder.heartbeats)
        if logged and len(beats) == 2 and not dead & {beat.pid for beat in beats}:
            break
        time.sleep(0.005)
    after_s, rank = rng.uniform(0, 0.05), rng.randrange(2)
    time.sleep(after_s)
    seen = {beat.rank: beat for beat in read_heartbeats(folder.heartbeats)}.get(rank, beats[rank])
    os.kill(beats[rank].pid, signal.SIGKILL)
    dead |= {beat.pid for beat in beats}
    where = f"{seen.phase} {seen.step} of start {seen.generation}"
    print(f"rank {rank} was killed {after_s:.4f} s after step {step} was logged, in {where}")


@pytest.mark.slow
@pytest.mark.timeout(1200 + 60 * KILLS)
def test_kills_at_random_moments_change_no_bit(tmp_path: Path) -> None:
    """Nor do they lose or damage a checkpoint, in a run that saves, validates and goes back. TEST_KILLS=N: so many."""
    rng = random.Random(seeded())
    guard = (*GUARD, f"max_steps={STEPS}")
    data = make_plants(tmp_path / "data", SPIKES, 1, *guard, tokens=(60000, 45000, 55000))
    saving = ("eval.every=5", "checkpoint.every_steps=2", "checkpoint.keep=1000")
    common = (f"data.path={data}", *guard, "model.dropout=0.1", *saving)
    pretrain(tmp_path / "whole", *common, ranks=2)
    back = [(step, to) for step, _, did, to, _ in events(tmp_path / "whole") if did == "rolled back"]
    assert back == [(152, 150)]
    run, dead = tmp_path / "run", set[int]()
    process = supervised(run, *common, "watch.beat_s=0.05", direct=True, max_restarts=KILLS)
    try:
        for step in sorted([153, *rng.sample(range(4, STEPS - 20), KILLS - 1)]):
            kill_a_rank(process, run, dead, step, rng)
        [(code, err)] = finish([process], 400)
    finally:
        process.kill()
    assert code == 0, err[-3000:]
    assert [row["event"] for row in rows(run)].count("start") == KILLS + 1
    assert all(row["cause"] for row in rows(run) if row["event"] == "exit" and row["exit_code"])
    published = RunFolder(run).published()
    assert {step_of(path) for path in published} >= {
        step_of(path) for path in RunFolder(tmp_path / "whole").published()
    }
    for path in published:
        files = check_files(path)
        verify(path, files, list(files))
    slowest = [row.metrics for row in read_journal(run / "metrics.jsonl") if "speed/straggler" in row.metrics]
    assert slowest and all(m["speed/straggler"] >= 1 and m["speed/slowest_rank"] in (0, 1) for m in slowest)
    assert [step for step, _ in story(run)] == list(range(1, STEPS + 1))
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

"""A signal to one rank: all ranks agree on a step, one checkpoint is published, and the run goes on from it exactly."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.system.runs import finish, make_data, pretrain, start
from tests.system.test_resume import story, weights
from trainer.journal import read_journal
from trainer.run_folder import RunFolder


def signal_at(processes: list[subprocess.Popen[str]], run: Path, step: int, rank: int, number: int) -> None:
    """One rank gets the signal once `step` is logged."""
    deadline = time.monotonic() + 200
    journal = run / "metrics.jsonl"
    while not (journal.exists() and any(row.step >= step for row in read_journal(journal))):
        dead = [p for p in processes if p.poll() is not None]
        assert not dead, f"a rank ended before step {step}: {dead[0].communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.005)
    processes[rank].send_signal(number)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    rng = random.Random()
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
    data = make_data(tmp_path / "data")
    process = start(tmp_path / "run", f"data.path={data}", "max_steps=3", ranks=2)
    process[0].kill()
    maps = Path(f"/proc/{process[1].pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process[1].send_signal(number)
    _, (ended, err) = finish(process)
    assert ended == code
    assert err.splitlines()[-1].endswith("before the first step: nothing to save, nothing lost")

"""A rank that comes no further is found, named with its place, and ends the run; the next start goes on exactly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.system.runs import finish, make_data, pretrain
from tests.system.supervised import rows, supervised
from tests.system.test_resume import story, weights
from trainer.health.hang_report import read_spots
from trainer.run.folder import RunFolder

QUICK = ("watch.beat_s=0.2", "watch.hang_min_s=4", "watch.hang_factor=3")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hung_rank_is_named_and_the_run_restarts(tmp_path: Path) -> None:
    """With its place in the code; the next start goes on bit for bit."""
    sleeper, step = random.randrange(2), random.randrange(5, 9)
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=12", *QUICK)
    run = tmp_path / "run"
    process = supervised(run, *common, f"plant={sleeper}:{step}:1000", entry="tests.helpers.planted")
    [(code, err)] = finish([process])
    assert code == 0, err
    folder = RunFolder(run)
    spots = {spot.rank: spot for spot in read_spots(folder.hang(1))}
    assert spots.keys() == {0, 1}
    assert spots[sleeper].code.startswith("sleeps_here (tests/helpers/planted.py:")
    assert spots[1 - sleeper].code.startswith("collective all_reduce, called by add_votes (trainer/vote.py:")
    for rank in (0, 1):
        stacks = (folder.hang(1) / f"rank-{rank:05d}.txt").read_text()
        assert stacks.count("Thread 0x") >= 3 and ("sleeps_here" in stacks) == (rank == sleeper)
    report = folder.hang_report(1).read_text()
    assert f"without another (limit 4 s): waiting for rank {sleeper} on " in report.splitlines()[0]
    assert err.count(f"watch: {report.splitlines()[0]}") == 1, "one rank tells it"
    assert [(row["exit_code"], row.get("cause")) for row in rows(run) if row["event"] == "exit"] == [
        (86, report.splitlines()[0]),
        (0, None),
    ]
    pretrain(tmp_path / "whole", *common, ranks=2)
    assert story(run) == story(tmp_path / "whole")
    assert weights(run) == weights(tmp_path / "whole")

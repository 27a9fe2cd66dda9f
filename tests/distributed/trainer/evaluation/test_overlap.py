"""`python -m trainer.evaluate against=SHARDS`: one report for every number of ranks, and for a killed search."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.trainer.evaluation.test_evaluation import DIES, ended, journaled, start
from tests.helpers.evaluation_data import random_checkpoint
from tests.helpers.overlaps import Planted
from tests.helpers.seeds import seeded

DIES_IN_SEARCH = DIES.replace(">= 20", ">= 2")


@pytest.mark.slow
def test_two_ranks_end_what_one_has_begun(tmp_path: Path) -> None:
    """Killed by -9 in mid-line of the search's journal; the report is that of one rank left alone."""
    seed = seeded()
    planted = Planted(tmp_path, seed)
    planted.write(tmp_path / "data")
    _, checkpoint = random_checkpoint(tmp_path, 96, seed)
    names = [planted.names[name] for name in ("choose", "complete")]
    common = [f"checkpoint={checkpoint}", f"tasks=[{','.join(names)}]", f"task_data={tmp_path}", "json=true"]
    common.append(f"against={tmp_path / 'data' / 'shards'}")
    whole = ended(start(1, *common, f"output={tmp_path / 'whole'}"))["results"]
    (process,) = start(1, *common, f"output={tmp_path / 'killed'}", module=("-c", DIES_IN_SEARCH))
    _, err = process.communicate(timeout=250)
    assert process.returncode == -signal.SIGKILL, err[-2000:]
    searched = [len(overlaps(tmp_path / name)) for name in ("killed", "whole")]
    assert searched[0] == 2 < searched[1] and not journaled(tmp_path / "killed")
    again = ended(start(2, *common, f"output={tmp_path / 'killed'}"))["results"]
    assert sorted(overlaps(tmp_path / "killed")) == sorted(overlaps(tmp_path / "whole"))
    assert len(journaled(tmp_path / "killed")) == len(set(journaled(tmp_path / "killed")))
    assert flat(again) == pytest.approx(flat(whole), rel=1e-6)
    for name in names:
        dirty = planted.dirty(Path(name).stem)
        assert whole[name]["dirty"]["n"] == sum(dirty) > 0 < whole[name]["clean"]["n"] == len(dirty) - sum(dirty)


def overlaps(output: Path) -> list[str]:
    """The hash of each whole line of the search's journal."""
    return journaled(output, "overlap")


def flat(body: dict[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in body.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}

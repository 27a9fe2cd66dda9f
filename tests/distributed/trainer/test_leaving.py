"""At the end of a run the other ranks stay until rank 0 has closed its tracker: a launcher ends who is left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.helpers.ranks import run_ranks
from tests.system.runs import TINY, make_data
from trainer.config.pretrain import PretrainConfig


def train(root: str, closed: str) -> bool:
    """Whether rank 0 had closed its tracker when this rank was done with the run."""
    from conf.schema import load
    from trainer.pretrain import pretrain
    from trainer.tracking.tracker import Tracker

    close = Tracker.close

    def slowly(self: Tracker, *args: Any) -> None:
        close(self, *args)
        time.sleep(3)
        Path(closed).touch()

    Tracker.close = slowly  # type: ignore[method-assign]
    pretrain(load(PretrainConfig, [*TINY, f"run.dir={root}/run", f"data.path={root}/data", "max_steps=2"]))
    return Path(closed).exists()


def test_no_rank_ends_before_rank_0_has_closed_its_tracker(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    target = "tests.distributed.trainer.test_leaving:train"
    assert run_ranks(2, target, root=str(tmp_path), closed=str(tmp_path / "closed")) == [True, True]


def wait() -> str:
    """Rank 0 comes to the first, and not to the second: the time ends it."""
    from trainer.config.parallel import ParallelConfig
    from trainer.distributed.mesh import join_ranks, wait_for_main
    from trainer.distributed.world import read_world

    mesh = join_ranks(read_world(), ParallelConfig())
    wait_for_main(mesh, "first", 100)
    if not mesh.world.is_main:
        wait_for_main(mesh, "second", 1)
    return "left"


def test_a_rank_0_that_is_gone_or_late_keeps_nobody() -> None:
    assert run_ranks(2, "tests.distributed.trainer.test_leaving:wait") == ["left", "left"]

"""`python -m tests.helpers.planted plant=RANK:STEP:SECONDS OVERRIDES...`: the real entry, where one rank sleeps, once.

"Once" is kept in a file beside the run folder's hangs, so that a second start goes on.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

from trainer.data.shard_feed import ShardFeed


def sleeps_here(seconds: float) -> None:
    time.sleep(seconds)


def plant(rank: int, step: int, seconds: float, once: Path) -> None:
    honest = ShardFeed.next
    steps = [0]  # done by this start

    def planted(self):  # type: ignore[no-untyped-def]
        if self.mesh.world.rank == rank and steps[0] == step and not once.exists():
            once.touch()
            sleeps_here(seconds)
        steps[0] += 1
        return honest(self)

    ShardFeed.next = planted  # type: ignore[method-assign]


if __name__ == "__main__":
    [what] = [word for word in sys.argv if word.startswith("plant=")]
    sys.argv.remove(what)
    rank, step, seconds = (int(number) for number in what.removeprefix("plant=").split(":"))
    run_dir = next(word.removeprefix("run.dir=") for word in sys.argv if word.startswith("run.dir="))
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    plant(rank, step, seconds, Path(run_dir) / "slept")
    runpy.run_module("trainer.pretrain", run_name="__main__", alter_sys=True)

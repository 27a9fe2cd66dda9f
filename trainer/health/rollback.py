"""A rollback: return to the run's last good checkpoint and go on behind the bad data, as a new start in this process.

The mesh stays, since a process cannot create its gloo groups a second time; the engine, the feed and the saver are
built again, as a start builds them. So the run continues as a start from that checkpoint with that data state would.

    saver waits -> all ranks agree on the target -> `latest` moves back, later checkpoints are deleted
    -> a new generation -> old engine freed -> as any start

Killed before its next checkpoint, the run resumes from the same checkpoint, meets the same steps, judges them the same
and rolls back the same way: a rollback stores nothing that the checkpoints do not hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from trainer.checkpoint.claim import newest_whole, set_aside
from trainer.checkpoint.find import read_state
from trainer.data.feed import Feed
from trainer.distributed.collective import all_ranks
from trainer.distributed.mesh import Mesh
from trainer.health.spike_guard import Guard
from trainer.run.folder import RunFolder, step_of


class Target(NamedTuple):
    """The start that a rollback continues as."""

    checkpoint: Path | None  # None: the beginning of the run
    state: dict[str, Any]  # the checkpoint's, with the data state behind the jump
    generation: int


def roll_back(
    mesh: Mesh, run: RunFolder, guard: Guard, feed: Feed, *, step: int, every_steps: int, generation: int
) -> Target:
    """Move the run folder and the guard back before the bad steps, which end at `step`. Collective.

    `every_steps`: between two checkpoints. Nothing may be in flight.

    Raises:
        UserError: on every rank, before anything has moved: the run has rolled back as often as it may, or too little
            data is left behind the jump.
    """
    guard.refuse_another(step)
    what = f"run.dir={run.root} cannot go back"
    is_main = mesh.world.is_main

    def candidates() -> list[Path]:
        """The checkpoints before the bad steps, each for the case that those before it are damaged."""
        found, end = [], guard.first_bad(step)
        while (checkpoint := run.before(end, every_steps, generation)) is not None:
            found.append(checkpoint)
            end = step_of(checkpoint) - 1
        return found

    def look_ahead() -> dict[str, Any]:
        state = read_state(checkpoint) if checkpoint else {}
        return {**state, "data": feed.jump(state.get("step", 0), step)}

    def move() -> int | None:
        if not is_main:
            return None
        for line in set_aside(run, generation, damaged):
            print(f"guard: {line}", flush=True)
        if deleted := run.go_back(checkpoint, generation):
            print(f"guard: removed, as made of the bad steps: {', '.join(p.name for p in deleted)}", flush=True)
        taken = run.take_generation()
        run.begin(taken, checkpoint)
        return taken

    checkpoint, damaged = newest_whole(run, mesh, candidates)
    state = all_ranks(what, look_ahead)[mesh.world.rank]
    new_generation = all_ranks(what, move)[0]
    assert new_generation is not None
    first = state.get("step", 0)
    guard.roll_back(state.get("guard"), first, (feed.position(first), feed.position(step)))
    return Target(checkpoint, state, new_generation)

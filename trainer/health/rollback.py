"""Going back: the run's last good checkpoint, the windows since then jumped over, as a new start in this process.

The mesh stays, since a process cannot meet its gloo groups a second time; the engine, the feed and the saver are made
anew, as a start makes them. So what follows is what a start from that checkpoint with that ledger would do.

    saver waits -> all ranks make the plan -> `latest` moves back, later checkpoints go -> a new generation
    -> old engine away -> as any start

Killed before the first checkpoint after it, the run resumes from the same checkpoint, meets the same steps, judges them
the same and goes back the same way: nothing of a rollback has to be remembered that the checkpoints do not hold.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.order.plan import Plan
from trainer.checkpoint import load as checkpoint
from trainer.data.sources import plan_of
from trainer.distributed.collective import all_ranks
from trainer.run.progress import SAVE

if TYPE_CHECKING:
    from trainer.loop import Trainer


def maybe_roll_back(t: Trainer) -> bool:
    """After a bad step, the last before `t.step`: says so, and goes back where there were too many. Collective."""
    if t.mesh.world.is_main:
        print(f"guard: {t.guard.told()}", flush=True)
    if not t.guard.must_roll_back(t.step):
        return False
    with t.progress.phase(SAVE):
        roll_back(t)
    t.progress.begin(t.step)
    return True


def roll_back(t: Trainer) -> None:
    """Go back before the bad steps, which end at `t.step`. Collective.

    Raises:
        UserError: on every rank: it has gone back as often as it may, no data is left behind the jump, or what a start
            may raise.
    """
    check_skips(t)
    t.guard.refuse_another(t.step)
    t.feed.close()
    t.saver.wait()
    what = f"run.dir={t.run.root} cannot go back"
    name = all_ranks(what, lambda: _goal(t))[0]
    found = t.run.checkpoints / name if name else None
    ahead: list[tuple[dict[str, Any], Plan]] = []
    all_ranks(what, lambda: ahead.append(_ahead(t, found)))  # nothing has moved where one of them cannot
    [(state, plan)] = ahead
    generation = next(g for g in all_ranks(what, lambda: _move(t, found)) if g)
    to, before = state.get("step", 0), t.plan.ledger
    t.guard.roll_back(state.get("guard"), to, (before.position(to), before.position(t.step)))
    if t.mesh.world.is_main:
        print(f"guard: {t.guard.told()}", flush=True)
    _free_engine(t)
    t.generation = generation
    t.stand(found, state, plan)
    t.speed.start()


def check_skips(t: Trainer) -> None:
    """Raises TransientError on every rank where not all have skipped the same steps. Collective."""
    t.guard.check(float(t.agree_on_step([], None)[-1]), t.mesh.world.world_size)


def _goal(t: Trainer) -> str | None:
    """The name of the checkpoint to go back to, of rank 0; None for the beginning, and elsewhere."""
    to = t.run.before(t.guard.first_bad(t.step), t.cfg.checkpoint.every_steps) if t.mesh.world.is_main else None
    return to.name if to else None


def _ahead(t: Trainer, found: Path | None) -> tuple[dict[str, Any], Plan]:
    """The state to go back to and the plan from there on. Raises UserError where either cannot be."""
    state = checkpoint.read_state(found) if found else {}
    return state, plan_of(t.cfg, t.sources, t.plan.ledger.jump(state.get("step", 0), t.step))


def _move(t: Trainer, to: Path | None) -> int | None:
    """Rank 0: the run's pointer and a new generation, which is returned."""
    if not t.mesh.world.is_main:
        return None
    if gone := t.run.go_back(to, t.generation):
        print(f"guard: removed, as made of the bad steps: {', '.join(p.name for p in gone)}", flush=True)
    return t.run.take_generation()


def _free_engine(t: Trainer) -> None:
    """The old engine's memory, before the new one takes as much."""
    t.engine.close()
    t.saver.release()
    del t.engine
    gc.collect()
    if t.mesh.device.type == "cuda":
        torch.cuda.empty_cache()

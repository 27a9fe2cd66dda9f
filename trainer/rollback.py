"""Going back: the run's last good checkpoint, the windows since then jumped over, as a new start in this process.

The mesh stays, since a process cannot meet its gloo groups a second time; the engine, the feed and the saver are made
anew, as a start makes them. So what follows is what a start from that checkpoint with that ledger would do.

    saver waits -> `latest` moves back, later checkpoints go -> a new generation -> old engine away -> as any start

Killed before the first checkpoint after it, the run resumes from the same checkpoint, meets the same steps, judges them
the same and goes back the same way: nothing of a rollback has to be remembered that the checkpoints do not hold.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer import checkpoint
from trainer.sources import plan_of

if TYPE_CHECKING:
    from trainer.loop import Trainer


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
    told = checkpoint.together(f"run.dir={t.run.root} cannot go back", lambda: _move(t))
    generation, name = next(each for each in told if each is not None)
    found = t.run.checkpoints / name if name else None
    state = checkpoint.read_state(found) if found else {}
    to, ledger = state.get("step", 0), t.plan.ledger
    t.guard.roll_back(state.get("guard"), to, (ledger.position(to), ledger.position(t.step)))
    if t.mesh.world.is_main:
        print(f"guard: {t.guard.told()}", flush=True)
    plan = plan_of(t.cfg, t.sources, ledger.jump(to, t.step))
    _free_engine(t)
    t.generation = generation
    t.stand(found, state, plan)
    t.speed.start()


def check_skips(t: Trainer) -> None:
    """Raises Passing on every rank, where not all have skipped the same steps. Collective; waits for the device."""
    t.guard.check(float(t.agree_on_step([], None)[-1]), t.mesh.world.world_size)


def _move(t: Trainer) -> tuple[int, str] | None:
    """Rank 0: the run's pointer and a new generation. Returns the generation and the checkpoint's name, "" for none."""
    if not t.mesh.world.is_main:
        return None
    to = t.run.before(t.guard.first_bad(t.step), t.cfg.checkpoint.every_steps)
    if to is not None:
        checkpoint.read_state(to)  # one that cannot be read is no place to go
    gone: list[Path] = t.run.go_back(to, t.generation)
    if gone:
        print(f"guard: removed, as made of the bad steps: {', '.join(p.name for p in gone)}", flush=True)
    return t.run.take_generation(), to.name if to else ""


def _free_engine(t: Trainer) -> None:
    """The old engine's memory, before the new one takes as much."""
    t.engine.close()
    t.saver.release()
    del t.engine
    gc.collect()
    if t.mesh.device.type == "cuda":
        torch.cuda.empty_cache()

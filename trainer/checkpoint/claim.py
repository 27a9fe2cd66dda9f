"""The claim of a run folder by a start, and its choice of the checkpoint to go on from. Collective."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from conf.errors import UserError
from data_pipeline.files import publish
from trainer.checkpoint.changes import changed_values
from trainer.checkpoint.find import damage, none_whole, to_resume
from trainer.distributed.collective import all_ranks
from trainer.distributed.mesh import Mesh
from trainer.run.folder import RunFolder, step_of
from trainer.run.owner import command, job, refuse_living

Damaged = list[tuple[Path, str]]
"""Checkpoints, each with its damage in words."""


def claim_run(
    run: RunFolder, mesh: Mesh, config_text: str, take_over: int | None, beat_s: float, resume_step: int | None
) -> tuple[int, Path | None]:
    """Take the next generation on rank 0 and freeze the config; then choose the checkpoint to go on from.

    Raises:
        UserError: on every rank, if another start goes on that is not number `take_over`, the folder cannot be written
            or the ranks do not see the same checkpoint.
    """
    what = f"run.dir={run.root} cannot be used"

    def take() -> int:
        if not mesh.world.is_main:
            return 0
        refuse_strangers(run)
        refuse_living(run, take_over, beat_s)
        generation = run.take_generation(job=job(), command=command())
        publish(run.config, config_text.encode())
        return generation

    [generation, *_] = all_ranks(what, take)
    latest = run.latest()
    step = step_of(latest) if latest else 0
    bounds = torch.tensor([step, -step], device=mesh.device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if bounds[0] != -bounds[1]:
        raise UserError(
            f"the ranks' last checkpoints in run.dir={run.root} go from step {-bounds[1]} to step {bounds[0]}: "
            "give a folder that all nodes share"
        )
    checkpoint, damaged = newest_whole(run, mesh, partial(to_resume, run, resume_step))
    all_ranks(what, lambda: _begin(run, generation, checkpoint, damaged) if mesh.world.is_main else None)
    if mesh.world.is_main and checkpoint is not None and resume_step not in (None, step_of(checkpoint)):
        said = f"resume_step={resume_step}: this same command has gone back to it, and goes on from {checkpoint.name}"
        print(f"{said}; to go back once more, change a word of it", flush=True)
    return generation, checkpoint


def refuse_strangers(run: RunFolder) -> None:
    """Raises UserError if a run's first start would overwrite what it did not make."""
    theirs = [] if run.newest_generation() else [path.name for path in (run.config, run.metrics) if path.exists()]
    if theirs:
        raise UserError(f"it holds {' and '.join(theirs)} and no start of a run: give another run.dir")


def newest_whole(run: RunFolder, mesh: Mesh, candidates: Callable[[], list[Path]]) -> tuple[Path | None, Damaged]:
    """The first of rank 0's candidates that is whole, each of its files verified by one rank, and those before it.

    Collective. (None, []) without candidates.

    Raises:
        UserError: on every rank, if there are some and none is whole.
    """
    what, rank, ranks = f"run.dir={run.root} cannot be used", mesh.world.rank, mesh.world.world_size
    damaged: Damaged = []
    for path in all_ranks(what, lambda: candidates() if rank == 0 else [])[0]:
        problem = next(filter(None, all_ranks(what, partial(damage, path, rank, ranks))), None)
        if problem is None:
            return path, damaged
        damaged.append((path, problem))
    if damaged:
        raise none_whole(run, damaged[0][1])
    return None, []


def _begin(run: RunFolder, generation: int, checkpoint: Path | None, damaged: Damaged) -> None:
    """Make `checkpoint` this start's own, and say why it is that one where the pointer does not say it."""
    why = [run.pointer_problem(), *set_aside(run, generation, damaged)]
    if checkpoint is not None and any(why):
        print(f"warning: {'; '.join(filter(None, why))}", file=sys.stderr, flush=True)
        print(f"warning: the newest checkpoint that verifies is taken: {checkpoint.name}", file=sys.stderr, flush=True)
    changed = changed_values(checkpoint / "config.yaml", run.config) if checkpoint else {}
    if others := run.begin(generation, checkpoint, changed=changed):
        names = ", ".join(path.name for path in others)
        print(f"warning: {names}: this start does not descend from them and deletes none", file=sys.stderr, flush=True)


def set_aside(run: RunFolder, generation: int, damaged: Damaged) -> list[str]:
    """Rename damaged checkpoints, so that no start tries them again; returns a line on each."""
    return [f"{problem}: set aside as {run.set_aside(path, generation).name}" for path, problem in damaged]

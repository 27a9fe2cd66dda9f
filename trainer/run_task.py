"""The run of a task, from a checked config to its exit code: the body of every entry that trains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from conf.errors import TransientError, out_of_memory
from conf.frozen import freeze
from trainer.config.train import TrainConfig
from trainer.distributed.world import World
from trainer.plan.layout import Layout
from trainer.plan.room import check_room, describe
from trainer.plan.workload import Workload
from trainer.run.signals import Stopped

if TYPE_CHECKING:
    from trainer.task import Task


def run_task(
    cfg: TrainConfig, world: World, work: Workload, make_task: Callable[[], Task], lines: Sequence[str]
) -> None:
    """Train to the end of the run, or exit with the code of what stops it.

    Args:
        cfg: checked, with nothing left open.
        work: of a step, for the check of memory.
        make_task: called once the model fits, for a task imports torch.
        lines: to print first.

    Raises:
        UserError: the model does not fit, or the run ends with a mistake of the user.
        TransientError: memory ran out.
    """
    if world.is_main:
        for line in filter(None, lines):
            print(line, flush=True)
    from trainer.distributed.lost_ranks import ranks_lost
    from trainer.loop import Trainer  # from here on torch, deepspeed and megatron
    from trainer.metrics import gpu_bytes

    layout = Layout.of(cfg.parallel, int(cfg.micro_batch_size), world.world_size)
    check_room(work, layout, gpu_bytes(), world.local_world_size or world.world_size)  # after the imports
    try:
        with (
            ranks_lost(world, cfg.watch.collective_s),
            Trainer(cfg, freeze(cfg), world, make_task()) as trainer,
        ):
            trainer.train()
    except Stopped as e:
        if world.is_main:
            print(e, file=sys.stderr, flush=True)
        sys.exit(e.code)
    except (MemoryError, RuntimeError, OSError) as e:
        if cause := out_of_memory(e):
            raise TransientError(f"rank {world.rank}: {cause}; {describe(work, layout)}") from None
        raise

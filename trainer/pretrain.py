"""Entry: `python -m trainer.pretrain`, alone or under torchrun, deepspeed or Slurm.

Everything that can be refused is refused here, before torch is imported.
"""

from __future__ import annotations

import sys

from conf.frozen import freeze
from conf.schema import run
from trainer.check import check
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.world import read_world
from trainer.run.signals import OF_THIS_PROCESS, Stopped


def pretrain(cfg: PretrainConfig) -> None:
    world = read_world()
    cfg, geometry, sources, _, chosen = check(cfg, world)
    if chosen and world.is_main:
        print(chosen, flush=True)
    from trainer.distributed.lost_ranks import ranks_lost
    from trainer.loop import Trainer  # from here on torch, deepspeed and megatron

    try:
        with (
            ranks_lost(world, cfg.watch.collective_s),
            Trainer(cfg, freeze(cfg), world, geometry, sources) as trainer,
        ):
            trainer.train()
    except Stopped as e:
        if world.is_main:
            print(e, file=sys.stderr, flush=True)
        sys.exit(e.code)


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(PretrainConfig, pretrain)

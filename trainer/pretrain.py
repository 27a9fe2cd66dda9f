"""Entry: `python -m trainer.pretrain`, alone or under torchrun, deepspeed or Slurm.

Everything that can be refused is refused here, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conf.schema import run
from trainer.check import Checked, check
from trainer.config.pretrain import PretrainConfig
from trainer.data.sources import fetch_s
from trainer.distributed.world import read_world
from trainer.plan.workload import Workload
from trainer.run.signals import OF_THIS_PROCESS
from trainer.run_task import run_task

if TYPE_CHECKING:
    from trainer.data.shard_feed import ShardFeed
    from trainer.engine.engine import Engine
    from trainer.task import Task


def pretrain(cfg: PretrainConfig) -> None:
    """Train a language model from shards."""
    world = read_world()
    checked = check(cfg, world)
    lines = (checked.chosen, checked.tracked, checked.new_tokens, checked.done)
    run_task(checked.cfg, world, Workload.of(checked.cfg), lambda: language_model(checked), lines)


def language_model(checked: Checked) -> Task:
    """The task of pre-training: the language model's loss, over windows of shards."""
    from trainer.data.shard_feed import ShardFeed
    from trainer.objective.language_model import LanguageModel
    from trainer.task import Task

    cfg, sources = checked.cfg, checked.sources

    def feed(engine: Engine, state: Mapping[str, Any]) -> ShardFeed:
        return ShardFeed(
            cfg.data,
            engine.mesh,
            sources,
            checked.plan(state),
            step=state.get("step", 0),
            n_ctx=cfg.model.n_ctx,
            max_steps=cfg.max_steps,
            micro_batch_size=int(cfg.micro_batch_size),
            eval_windows=cfg.eval.windows,
            train_windows=cfg.eval.train_windows,
            infill=checked.infill,
        )

    return Task(
        LanguageModel(),
        feed,
        eval_every=cfg.eval.every,
        patience=cfg.eval.patience,
        fetch_s=fetch_s(cfg.data, sources),
        tokenizer=checked.tokenizer,
        eot_id=sources.any.eot_id,
        samples=checked.samples,
        scores=checked.scores,
    )


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(PretrainConfig, pretrain)

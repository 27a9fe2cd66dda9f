"""Entry: `python -m trainer.dpo`: direct preference optimisation, alone or under torchrun, deepspeed or Slurm.

Each step reads pairs of a better and a worse answer to one prompt. The weights that the run starts from are its
reference, which it keeps a copy of (trainer/checkpoint/frozen.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from conf.schema import run
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.pairs import Pair, read_pairs
from data_pipeline.examples.templates import Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.parallel import Precision
from trainer.config.tuning.dpo import DpoConfig
from trainer.distributed.world import read_world
from trainer.run.folder import RunFolder
from trainer.run.signals import OF_THIS_PROCESS
from trainer.run_task import run_task
from trainer.tuning.check import Checked, Reader, check

if TYPE_CHECKING:
    from trainer.data.feed import Feed
    from trainer.engine.engine import Engine
    from trainer.model.gpt import GPT
    from trainer.task import Task


def dpo(cfg: DpoConfig) -> None:
    """Tune a language model to prefer the better one of two answers."""
    world = read_world()

    def read(path: str, tokenizer: Tokenizer, n_ctx: int) -> Examples[Pair, Renderer]:
        return read_pairs(replace(cfg.examples, path=path), tokenizer, n_ctx)

    checked = check(cfg, world, cfg.examples.path, Reader(read, lambda pair: pair.ids, side=lambda pair: pair.prompt))
    run_task(checked.cfg, world, checked.workload, lambda: preferences(checked), checked.lines)


def preferences(checked: Checked[DpoConfig, Pair, Renderer]) -> Task:
    """The task of direct preference optimisation: its loss against the frozen weights of the start, over pairs."""
    from trainer.data.collate import row_multiple
    from trainer.data.pairs import pairs
    from trainer.objective.preference import Preference
    from trainer.task import Task
    from trainer.tuning.feed import make_feed

    cfg = checked.cfg
    objective = Preference(cfg.beta)
    collate = partial(pairs, n_ctx=cfg.model.n_ctx, multiple=row_multiple(cfg.parallel.tp))
    make = make_feed(checked, collate, "pairs")

    def feed(engine: Engine, state: Mapping[str, Any]) -> Feed:
        objective.reference = reference(cfg, engine, objective.reference, resumed=state.get("step", 0) > 0)
        return make(engine, state)

    return Task(
        objective,
        feed,
        eval_every=cfg.held_out.every,
        patience=cfg.held_out.patience,
        tokenizer=checked.tokenizer.raw,
        eot_id=checked.renderer.end,
    )


def reference(cfg: DpoConfig, engine: Engine, known: GPT | None, *, resumed: bool) -> GPT:
    """The frozen model that the engine's is compared with; `known`: it, where it is in memory already. Collective."""
    import torch

    from trainer.checkpoint.frozen import check_start, keep_reference, load_reference
    from trainer.engine.compile import prepare

    folder = keep_reference(RunFolder(cfg.run.dir), engine.mesh, str(cfg.init_from), resumed=resumed)
    model = known
    if model is None:
        split = cfg.parallel.sequence_parallel
        model = load_reference(folder, cfg.model, engine.mesh, seed=cfg.seed, sequence_parallel=split)
        model.to(torch.float32 if cfg.precision is Precision.fp32 else torch.bfloat16)
        prepare(model, cfg.precision, cfg.compile, cfg.parallel, engine.mesh)
    if not resumed:
        check_start(engine, model, str(cfg.init_from), folder)
    return model


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(DpoConfig, dpo)

"""Entry: `python -m trainer.dpo`: direct preference optimisation, alone or under torchrun, deepspeed or Slurm.

Each step reads pairs of a better and a worse answer to one prompt. The weights that the run starts from are its
reference, which it keeps a copy of (trainer/checkpoint/frozen.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import run
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.pairs import Pair, read_pairs
from data_pipeline.examples.templates import Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.parallel import Precision
from trainer.config.tuning.dpo import DpoConfig
from trainer.distributed.world import read_world
from trainer.plan.workload import Workload
from trainer.run.folder import RunFolder
from trainer.run.signals import OF_THIS_PROCESS
from trainer.run_task import run_task
from trainer.tuning.check import Checked, Reader, check

if TYPE_CHECKING:
    from trainer.data.example_feed import ExampleFeed
    from trainer.engine.engine import Engine
    from trainer.model.gpt import GPT
    from trainer.task import Task


def dpo(cfg: DpoConfig) -> None:
    """Tune a language model to prefer the better one of two answers."""
    world = read_world()

    def read(path: Path | str, tokenizer: Tokenizer, n_ctx: int) -> Examples[Pair, Renderer]:
        return read_pairs(replace(cfg.examples, path=str(path)), tokenizer, n_ctx)

    checked = check(cfg, world, cfg.examples.path, Reader(read, lambda pair: pair.ids, side=lambda pair: pair.prompt))
    work = Workload.of_rows(checked.cfg, 2 * cfg.batch_size)
    run_task(checked.cfg, world, work, lambda: preferences(checked), checked.lines)


def preferences(checked: Checked[DpoConfig, Pair, Renderer]) -> Task:
    """The task of direct preference optimisation: its loss against the frozen weights of the start, over pairs."""
    from trainer.data.example_feed import ExampleFeed, HeldOut
    from trainer.data.pairs import comparisons
    from trainer.objective.preference import Preference
    from trainer.task import Task

    cfg, n_ctx = checked.cfg, checked.cfg.model.n_ctx
    objective = Preference(cfg.beta)
    held_out = None
    if checked.held_out:
        rows = [[i] for i in range(len(checked.held_out))]
        held_out = HeldOut(rows, comparisons(checked.held_out, n_ctx, cfg.parallel.tp), f"{len(rows)} pairs")

    def feed(engine: Engine, state: Mapping[str, Any]) -> ExampleFeed:
        objective.reference = reference(cfg, engine, objective.reference, resumed=state.get("step", 0) > 0)
        return ExampleFeed(
            checked.order,
            comparisons(checked.train, n_ctx, cfg.parallel.tp),
            held_out,
            engine.mesh,
            step=state.get("step", 0),
            state=state.get("data", {}),
            about={**checked.about, "template": checked.renderer.template.value},
            micro_batch_size=int(cfg.micro_batch_size),
            n_ctx=n_ctx,
            fixed=False,
            lines=[],
        )

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

    from trainer.checkpoint.frozen import check_same, keep_reference, load_reference
    from trainer.engine.compile import prepare

    folder = keep_reference(RunFolder(cfg.run.dir), engine.mesh, str(cfg.init_from), resumed=resumed)
    model = known
    if model is None:
        split = cfg.parallel.sequence_parallel
        model = load_reference(folder, cfg.model, engine.mesh, seed=cfg.seed, sequence_parallel=split)
        model.to(torch.float32 if cfg.precision is Precision.fp32 else torch.bfloat16)
        prepare(model, cfg.precision, cfg.compile, cfg.parallel, engine.mesh)
    if not resumed:
        check_same(engine, model, str(cfg.init_from), folder)
    return model


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(DpoConfig, dpo)

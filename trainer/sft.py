"""Entry: `python -m trainer.sft`: supervised fine-tuning on conversations, alone or under torchrun, deepspeed or Slurm.

The loss is that of the answers and their end tokens, divided by the number of these tokens in the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import run
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.read import read_examples
from data_pipeline.examples.rows import pack
from data_pipeline.examples.templates import Example, Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.tuning.sft import SftConfig
from trainer.distributed.world import read_world
from trainer.plan.workload import Workload
from trainer.run.signals import OF_THIS_PROCESS
from trainer.run_task import run_task
from trainer.tuning.check import Checked, Reader, check

if TYPE_CHECKING:
    from trainer.data.example_feed import ExampleFeed
    from trainer.engine.engine import Engine
    from trainer.task import Task


def sft(cfg: SftConfig) -> None:
    """Tune a language model on the answers of conversations."""
    world = read_world()

    def read(path: Path | str, tokenizer: Tokenizer, n_ctx: int) -> Examples[Example, Renderer]:
        return read_examples(replace(cfg.examples, path=str(path)), tokenizer, n_ctx)

    reader = Reader(read, lambda example: example.ids, lambda example: len(example.ids) - 1)
    checked = check(cfg, world, cfg.examples.path, reader)
    work = Workload.of_rows(checked.cfg, cfg.batch_size)
    run_task(checked.cfg, world, work, lambda: answers(checked), checked.lines)


def answers(checked: Checked[SftConfig, Example, Renderer]) -> Task:
    """The task of supervised fine-tuning: the language model's loss, over packed conversations."""
    from trainer.data.collate import conversations
    from trainer.data.example_feed import ExampleFeed, HeldOut
    from trainer.objective.language_model import LanguageModel
    from trainer.task import Task

    cfg, n_ctx = checked.cfg, checked.cfg.model.n_ctx
    held_out = None
    if checked.held_out:
        lengths = [len(example.ids) - 1 for example in checked.held_out]
        rows = pack(range(len(lengths)), lengths, n_ctx)
        held_out = HeldOut(rows, conversations(checked.held_out, n_ctx), f"{len(lengths)} conversations")

    def feed(engine: Engine, state: Mapping[str, Any]) -> ExampleFeed:
        return ExampleFeed(
            checked.order,
            conversations(checked.train, n_ctx),
            held_out,
            engine.mesh,
            step=state.get("step", 0),
            state=state.get("data", {}),
            about={**checked.about, "template": checked.renderer.template.value},
            micro_batch_size=int(cfg.micro_batch_size),
            n_ctx=n_ctx,
            fixed=True,
            lines=[],
        )

    return Task(
        LanguageModel(),
        feed,
        eval_every=cfg.held_out.every,
        patience=cfg.held_out.patience,
        tokenizer=checked.tokenizer.raw,
        eot_id=checked.renderer.end,
    )


if __name__ == "__main__":
    OF_THIS_PROCESS.install()
    run(SftConfig, sft)

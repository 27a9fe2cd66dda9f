"""The lines that a run prints and the rows that it logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.config.model import ModelConfig
from trainer.config.train import TrainConfig
from trainer.data.feed import Feed
from trainer.data.validate import Validation
from trainer.distributed.mesh import Mesh
from trainer.engine.compile import describe_compile
from trainer.hf.settings import hf_refusal
from trainer.metrics import Speed, peak_memory_gib
from trainer.model import flex
from trainer.model.arithmetic import param_count
from trainer.step import Outcome


def run_summary(
    cfg: TrainConfig,
    mesh: Mesh,
    feed: Feed,
    checkpoint: Path | None,
    init_from: Path | None,
    changed: Sequence[str] = (),
) -> str:
    """The model, the layout, the data and the start of a run; `changed`: lines on what a resumed run changes."""
    work = feed.size(cfg.max_steps).done
    unit = "tokens" if feed.size(0).fixed else "examples"
    lines = [
        f"{cfg.run.name}: {cfg.model.name}, {param_count(cfg.model):,} parameters in {cfg.precision.value} on "
        f"{mesh.world.world_size} {mesh.device.type} ranks (dp={mesh.dp} tp={mesh.tp} "
        f"ZeRO-{cfg.parallel.zero_stage})",
        describe_compile(cfg.compile, cfg.parallel, mesh),
        f"the run: {work:,} {unit} in {cfg.max_steps:,} steps",
        *attention_lines(cfg.model, mesh.device),
        *feed.summary(),
        f"{cfg.run.dir}: {_start(cfg.init_from, checkpoint, init_from)}",
        *changed,
    ]
    return "\n  ".join(lines)


def attention_lines(model: ModelConfig, device: torch.device) -> list[str]:
    """The kernel of sparse attention, and the reason why the last checkpoint lacks files, where there is either."""
    sparse, n, refusal = model.sparse_layers, model.n_ctx, hf_refusal(model)
    files = [f"the last checkpoint gets no Hugging Face files: {refusal}"] if refusal else []
    if not sparse:
        return files
    how = "by FlexAttention, which skips what is masked"
    if not flex.takes(device, n, n, model.head_dim, model.dropout):
        how = "as dense attention under a mask, at a dense layer's cost"
        if flex.takes(device, n, n, model.head_dim, 0.0):
            how += f": FlexAttention has no dropout, and model.dropout={model.dropout}"
    return [f"attention: {model.attention}, {len(sparse)} of {model.n_layer} layers sparse, {how}", *files]


def step_row(
    outcome: Outcome, speed: Speed, memory_of: torch.device, *, fixed: bool, skipped: bool
) -> dict[str, float]:
    """The metrics of one step, without those of the data. `fixed`: work is counted in tokens (see `StepSize`)."""
    row = {
        "train/loss": outcome.loss,
        **{f"train/{name}": x for name, x in outcome.figures.items()},
        "optim/lr": outcome.lr,
        "optim/grad_norm": outcome.grad_norm,
        **{f"optim/grad_norm/{name}": norm for name, norm in outcome.part_norms.items()},
        **({"speed/tokens_per_s": speed.work_per_s, "speed/mfu": speed.mfu} if fixed else {}),
        **({} if fixed else {"speed/examples_per_s": speed.work_per_s}),
        "speed/loader_wait": speed.wait_share,
        "memory/peak_gib": peak_memory_gib(memory_of),
    }
    return {**row, "guard/skipped": 1} if skipped else row


def validation_row(found: Validation) -> dict[str, float]:
    """The metrics of a validation: the loss, and that of each set if there are several; so for training windows."""
    row = {}
    for key, losses in (("val/loss", found.val), ("val/train_loss", found.train)):
        if losses is not None:
            row[key] = losses.mean
            row |= {f"{key}/{name}": x for name, x in losses.each.items()} if len(losses.each) > 1 else {}
    return row | {f"val/{name}": x for name, x in found.val.figures.items()}


def validation_line(step: int, max_steps: int, found: Validation, anew: str | None = None) -> str:
    """`step 100/1500  val loss 3.4120`, with the loss of each set if there are several, and of training windows;
    `anew`: a line to follow."""
    each = "".join(f"  {name} {x:.4f}" for name, x in found.val.each.items()) if len(found.val.each) > 1 else ""
    each += "".join(f"  {name} {x:.4f}" for name, x in found.val.figures.items())
    trained = f"  of training windows {found.train.mean:.4f}" if found.train else ""
    return f"step {step}/{max_steps}  val loss {found.val.mean:.4f}{each}{trained}" + (f"\n  {anew}" if anew else "")


def _start(given: str | None, checkpoint: Path | None, init_from: Path | None) -> str:
    if checkpoint:
        ignored = f"; init_from={given} is not read again" if given else ""
        return f"goes on from {checkpoint.name}{ignored}"
    return f"starts from the weights of {init_from}, with a fresh optimizer" if init_from else "starts from nothing"

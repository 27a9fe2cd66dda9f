"""A training run of seconds, for tests that compare layouts: same weights and batches whatever computes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.config import IGNORE, DataConfig, SourceConfig
from data_pipeline.order.geometry import Geometry, batch_geometry
from data_pipeline.stream.loader import Batch
from trainer.checkpoint.save import Saver
from trainer.checkpoint.write import Writer, run_facts
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.model import ModelConfig
from trainer.config.optim import OptimConfig, ScheduleConfig, ScheduleKind
from trainer.config.parallel import Offload, ParallelConfig, Precision, Recompute
from trainer.config.pretrain import EvalConfig, PretrainConfig
from trainer.config.tracking import TrackerName, TrackingConfig
from trainer.config.train import RunConfig
from trainer.distributed.mesh import Mesh, join_ranks
from trainer.distributed.world import read_world
from trainer.engine.engine import Engine
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.language_model import LanguageModel
from trainer.objective.objective import Objective
from trainer.run.folder import RunFolder

WINDOWS, N_CTX = 8, 16
STEADY = {"eps": 1e-6}  # optim: a gradient that is 0 but for rounding makes no whole step of Adam's


def lr(step: int) -> float:
    return 5e-3 / (1 + step)


def model_config(**changes: Any) -> ModelConfig:
    """Odd on purpose: 3 heads that 2 ranks must pad, widths that 4 ranks do not divide, a vocabulary that is padded and
    big enough (> 100,000 weights) for ZeRO-3 to partition it truly."""
    base = {"name": "tiny", "n_layer": 2, "n_head": 3, "n_embd": 42, "n_ctx": N_CTX, "vocab_size": 2500}
    return ModelConfig(**{**base, "init_std": 0.05, **changes})  # type: ignore[arg-type]


def config(
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    zero: int = 1,
    precision: str = "fp32",
    micro_batch_size: int = 2,
    grad_clip: float = 1.0,
    offload: str = "none",
    recompute: str = "none",
    optim: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    keep: int = 10,
    background: bool = True,
) -> PretrainConfig:
    return PretrainConfig(
        run=RunConfig(name="tiny", dir="unused"),
        model=model_config(**(model or {})),
        optim=OptimConfig(
            name="tiny",
            lr=lr(0),
            schedule=ScheduleConfig(ScheduleKind.constant),
            grad_clip=grad_clip,
            **(optim or {}),
        ),
        data=DataConfig(name="synthetic", path="unused", sources={"synthetic": SourceConfig(".")}, lanes=4),
        parallel=ParallelConfig(
            name="tiny",
            tp=tp,
            sequence_parallel=sequence_parallel,
            zero_stage=zero,
            offload=Offload(offload),
            recompute=Recompute(recompute),
        ),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every_steps=0, keep=keep, background=background),
        tracking=TrackingConfig(name=TrackerName.none),
        tokens_per_step=WINDOWS * N_CTX,
        micro_batch_size=micro_batch_size,
        max_steps=10,
        precision=Precision(precision),
    )


def plain_adamw(parameters: Iterable[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """torch's own AdamW; biases and gains do not decay."""
    decay: list[torch.nn.Parameter] = []
    keep: list[torch.nn.Parameter] = []
    for p in parameters:
        (decay if p.dim() > 1 else keep).append(p)
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def plain_step(adam: torch.optim.AdamW, step: int, grad_clip: float) -> float:
    """Clip, update and clear the gradients; returns their norm before clipping."""
    params = [p for group in adam.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or float("inf"))
    for group in adam.param_groups:
        group["lr"] = lr(step)
    adam.step()
    adam.zero_grad()
    return norm.item()


def windows(step: int, vocab_size: int, n: int = WINDOWS) -> Batch:
    """All `n` windows of a step, [n, 16]; a few tokens are frequent, each window ignores another number of labels."""
    g = torch.Generator().manual_seed(1000 + step)
    ids = (vocab_size * torch.rand(n, N_CTX + 1, generator=g) ** 4).long()
    labels = ids[:, 1:].clone()
    for row in range(n):
        labels[row, : row % 5] = IGNORE
    return Batch(ids[:, :-1].contiguous(), labels)


def geometry(cfg: PretrainConfig, dp: int) -> Geometry:
    return batch_geometry(
        tokens_per_step=cfg.tokens_per_step,
        n_ctx=N_CTX,
        micro_batch_size=cfg.micro_batch_size,
        lanes=cfg.data.lanes,
        dp=dp,
    )


def micro_batches(step: int, cfg: PretrainConfig, mesh: Mesh) -> tuple[list[Batch], int]:
    """This rank's micro batches of a step, and the step's valid labels over all ranks."""
    whole = windows(step, cfg.model.vocab_size)
    size, share = cfg.micro_batch_size, WINDOWS // mesh.dp
    starts = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, size)
    return [Batch(*(t[s : s + size] for t in whole if t is not None)) for s in starts], int(
        (whole.labels != IGNORE).sum()
    )


@contextmanager
def layout(tp: int = 1) -> Iterator[Mesh]:
    """The ranks as (dp, tp). One process may enter several, one after another: the process group itself stays."""
    torch.set_num_threads(1)
    yield join_ranks(read_world(), ParallelConfig(name="tiny", tp=tp))


class TinyEngine(Engine):
    """An engine with the config it was built from."""

    def __init__(self, model: GPT, cfg: PretrainConfig, mesh: Mesh, objective: Objective | None = None) -> None:
        super().__init__(model, objective or LanguageModel(), cfg.optim, cfg.parallel, cfg.precision, mesh)
        self.cfg = cfg


def counts(*numbers: float) -> Tensor:
    """The global count of each term, as the vote gives it."""
    return torch.tensor(numbers, dtype=torch.float64)


def build(cfg: PretrainConfig, mesh: Mesh, seed: int = 7, load: Path | None = None) -> TinyEngine:
    """An engine with the weights of `seed`, or all that a checkpoint holds."""
    from trainer.checkpoint import load as checkpoint

    layout = cfg.parallel
    model = GPT(cfg.model, mesh, sequence_parallel=layout.sequence_parallel, recompute=layout.recompute)
    initialise(model, cfg.model, seed)
    if load:
        checkpoint.load_weights(load, model, mesh)
    engine = TinyEngine(model, cfg, mesh)
    if load:
        checkpoint.restore(load, engine)
    return engine


def saver(engine: TinyEngine, folder: Path) -> Saver:
    """For checkpoints of this engine in a run folder of their own, whose first start this is."""
    run = RunFolder(folder)
    if engine.mesh.world.is_main and not run.latest():
        run.take_generation()
    cfg = engine.cfg
    facts = run_facts(cfg.optim, cfg.model, cfg.parallel, cfg.precision, engine.mesh)
    return Saver(engine, Writer(cfg.model, engine.specs, cfg.checkpoint, engine.mesh, run, 1, "a: 1\n", facts))


def one_step(engine: TinyEngine, step: int) -> tuple[float, float]:
    """(loss over the step's valid labels, gradient norm)"""
    batches, valid = micro_batches(step, engine.cfg, engine.mesh)
    losses = [engine.backward(b, counts(valid), last=b is batches[-1]) for b in batches]
    loss = torch.stack(losses).sum() / valid
    dist.all_reduce(loss, group=engine.mesh.dp_group)
    return loss.item(), engine.step(lr(step))


def curve(engine: TinyEngine, steps: range = range(10)) -> list[tuple[float, float]]:
    return [one_step(engine, s) for s in steps]


def digest(engine: Engine) -> str:
    """Of all that this rank owns, bit for bit."""
    whole = hashlib.sha256()
    for name, t in owned_bits(engine).items():
        whole.update(name.encode() + t.numpy().tobytes())
    return whole.hexdigest()


def owned_bits(engine: Engine) -> dict[str, Tensor]:
    """Copies of all that this rank owns."""
    from trainer.engine.fragments import owned

    return {f"{k}/{f.name}": v.clone() for f in owned(engine.module, engine.adam) for k, v in f.views.items()}

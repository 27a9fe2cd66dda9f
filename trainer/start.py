"""How a start of a run comes to its place: the run folder taken, the engine built, the ledger carried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.config import Geometry, UserError
from data_pipeline.manifest import Manifest, publish
from data_pipeline.plan import Ledger, Order
from trainer import checkpoint
from trainer.arithmetic import param_count
from trainer.config import PretrainConfig
from trainer.engine import Engine, make_deterministic
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.parallel import Mesh
from trainer.run_folder import RunFolder


def take_run(run: RunFolder, mesh: Mesh, config_text: str) -> tuple[int, Path | None]:
    """Rank 0 takes the generation and freezes the config; then all ranks look for the last checkpoint.

    Raises:
        UserError: on every rank, where the folder cannot be written or the ranks do not see the same checkpoint.
    """

    def take() -> int:
        if not mesh.world.is_main:
            return 0
        generation = run.take_generation()
        publish(run.config, config_text.encode())
        return generation

    [generation, *_] = checkpoint.together(f"run.dir={run.root} cannot be used", take)
    found = run.latest()
    step = run.state(found)["step"] if found else 0
    bounds = torch.tensor([step, -step], device=mesh.device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if bounds[0] != -bounds[1]:
        raise UserError(
            f"the ranks' last checkpoints in run.dir={run.root} go from step {-bounds[1]} to step {bounds[0]}: "
            "give a folder that all nodes share"
        )
    return generation, found


def build_engine(cfg: PretrainConfig, geometry: Geometry, mesh: Mesh, found: Path | None) -> Engine:
    """One path for fresh and resumed: weights into the plain module, ZeRO around it, then masters and moments."""
    if cfg.deterministic and mesh.device.type == "cuda":  # a CPU always is
        make_deterministic()
    model = GPT(cfg.model, mesh, sequence_parallel=cfg.parallel.sequence_parallel, recompute=cfg.parallel.recompute)
    model.to(mesh.device)
    if found:
        checkpoint.load_weights(found, model, mesh)
    else:
        initialise(model, cfg.model, cfg.seed)
    engine = Engine(model, cfg, geometry, mesh)
    if found:
        checkpoint.restore(found, engine)
    return engine


def ledger_of(data: dict[str, Any] | None, step: int, geometry: Geometry) -> Ledger:
    """The run's ledger so far; a batch size that has changed since the checkpoint becomes an event from `step` on."""
    if data is None:
        return Ledger.start(geometry.windows_per_step)
    ledger = Ledger.from_json(data["ledger"])
    if ledger.windows_per_step(step) == geometry.windows_per_step:
        return ledger
    return ledger.then(step, ledger.position(step), geometry.windows_per_step)


def introduction(
    cfg: PretrainConfig,
    geometry: Geometry,
    mesh: Mesh,
    train: Manifest,
    order: Order,
    ledger: Ledger,
    found: Path | None,
) -> str:
    """What the run is, in four lines; what of the data no window holds is counted."""
    n_ctx = cfg.model.n_ctx
    unused = sum(s.tokens - (n_ctx * w + 1 if (w := s.windows(n_ctx)) else 0) for s in train.shards)
    return (
        f"{cfg.run.name}: {cfg.model.name}, {param_count(cfg.model):,} parameters in {cfg.precision.value} on "
        f"{mesh.world.world_size} {mesh.device.type} ranks (dp={mesh.dp} tp={mesh.tp} "
        f"ZeRO-{cfg.parallel.zero_stage})\n"
        f"  a step: {geometry.windows_per_step} windows of {n_ctx} tokens = dp {geometry.dp} x "
        f"micro batch {geometry.micro_batch_size} x {geometry.grad_accum_steps} micro steps\n"
        f"  data: {train.tokens:,} tokens = {order.windows:,} windows, and {unused:,} tokens in tails too short for "
        f"one; the run takes {order.epoch(ledger.position(cfg.max_steps)):.2f} epochs\n"
        f"  {cfg.run.dir}: " + (f"goes on from {found.name}" if found else "starts from nothing")
    )

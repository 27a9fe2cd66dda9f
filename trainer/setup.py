"""How a start of a run comes to its place: the run folder taken, the engine built, the ledger carried on."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from conf.errors import UserError
from data_pipeline.files import publish
from data_pipeline.order.geometry import Geometry
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import describe, rounding
from trainer.checkpoint import load as checkpoint
from trainer.checkpoint.find import find_checkpoint
from trainer.config.model import ModelConfig
from trainer.config.pretrain import PretrainConfig
from trainer.data.sources import Sources
from trainer.distributed.collective import all_ranks
from trainer.distributed.mesh import Mesh
from trainer.engine.compile import describe_compile, prepare
from trainer.engine.engine import Engine, make_deterministic
from trainer.health.recompute_check import check_recheck
from trainer.hf.weights import hf_refusal
from trainer.model import flex
from trainer.model.arithmetic import param_count
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.language_model import LanguageModel
from trainer.run.folder import RunFolder


def claim_run(run: RunFolder, mesh: Mesh, config_text: str) -> tuple[int, Path | None]:
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

    [generation, *_] = all_ranks(f"run.dir={run.root} cannot be used", take)
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


def init_checkpoint(cfg: PretrainConfig, found: Path | None) -> Path | None:
    """The checkpoint whose weights a new run starts from, the same on all ranks; None where it has none. Collective.

    Rank 0 looks, for the run that wrote it may be going on.
    """
    given = cfg.init_from
    if found is not None or given is None:
        return None
    looked = all_ranks(f"init_from={given} cannot be used", lambda: str(find_checkpoint(given, "init_from")))
    return Path(looked[0])


def build_engine(cfg: PretrainConfig, mesh: Mesh, found: Path | None, begin: Path | None = None) -> Engine:
    """One path for fresh and resumed: weights into the plain module, ZeRO around it, then masters and moments.

    From `found` come all of them, from `begin` the weights alone.
    """
    check_recheck(cfg, mesh.device.type)
    if cfg.deterministic and mesh.device.type == "cuda":  # a CPU always is
        make_deterministic()
    model = GPT(cfg.model, mesh, sequence_parallel=cfg.parallel.sequence_parallel, recompute=cfg.parallel.recompute)
    model.to(mesh.device)
    weights = found or begin
    if weights:
        checkpoint.load_weights(weights, model, mesh)
    else:
        initialise(model, cfg.model, cfg.seed)
    prepare(model, cfg.precision, cfg.compile, cfg.parallel, mesh)
    engine = Engine(model, LanguageModel(), cfg.optim, cfg.parallel, cfg.precision, mesh)
    if found:
        checkpoint.restore(found, engine)
    return engine


def run_summary(
    cfg: PretrainConfig,
    geometry: Geometry,
    mesh: Mesh,
    sources: Sources,
    plan: Plan,
    found: Path | None,
    begin: Path | None = None,
) -> str:
    """What the run is, and where its data goes; what of the data no window holds is counted."""
    ledger, end = plan.ledger, plan.ledger.position(cfg.max_steps)
    lines = [
        f"{cfg.run.name}: {cfg.model.name}, {param_count(cfg.model):,} parameters in {cfg.precision.value} on "
        f"{mesh.world.world_size} {mesh.device.type} ranks (dp={mesh.dp} tp={mesh.tp} "
        f"ZeRO-{cfg.parallel.zero_stage})",
        describe_compile(cfg.compile, cfg.parallel, mesh),
        f"the run: {ledger.tokens(cfg.max_steps):,} tokens in {cfg.max_steps:,} steps",
    ]
    for name, train in sources.train.items():
        n_ctx = cfg.model.n_ctx
        windows = [s.windows(n_ctx) for s in train.shards]
        unused = sum(s.tokens - (n_ctx * w + 1 if w else 0) for s, w in zip(train.shards, windows, strict=True))
        lines.append(
            f"data: {name}, {train.tokens:,} tokens = {sum(windows):,} windows, and {unused:,} tokens in tails too "
            f"short for one; the run takes {plan.epoch(name, end):.2f} epochs"
        )
    lines += [
        f"data: from step {step} on, {tokens:,} tokens of {name} that make no window of the new n_ctx wait for its "
        "next epoch"
        for step, name, tokens in plan.unread()
    ]
    lines += attention_lines(cfg.model, mesh.device)
    lines += describe(ledger, cfg.max_steps, geometry.dp, cfg.micro_batch_size)
    lines += rounding(cfg.data)
    lines.append(open_shards(sources, plan, mesh.dp))
    lines.append(f"{cfg.run.dir}: {_start(cfg, found, begin)}")
    return "\n  ".join(lines)


def _start(cfg: PretrainConfig, found: Path | None, begin: Path | None) -> str:
    if found:
        passed = f"; init_from={cfg.init_from} is not read again" if cfg.init_from else ""
        return f"goes on from {found.name}{passed}"
    return f"starts from the weights of {begin}, with a fresh optimizer" if begin else "starts from nothing"


def open_shards(sources: Sources, plan: Plan, dp: int) -> str:
    """How many shards a rank holds at once, and their bytes: one of each source for each lane."""
    lanes = plan.lanes // dp
    largest = {name: max(s.tokens for s in m.shards) * m.numpy_dtype.itemsize for name, m in sources.train.items()}
    mib = sum(lanes * size for size in largest.values()) >> 20
    return f"data: {lanes * len(largest)} shards open at once on each data-parallel rank, at most {mib:,} MiB"


def attention_lines(model: ModelConfig, device: torch.device) -> list[str]:
    """Of a model with sparse attention: what computes it, and what its last checkpoint goes without."""
    sparse, n = model.sparse_layers, model.n_ctx
    if not sparse:
        return []
    how = "by FlexAttention, which skips what is masked"
    if not flex.takes(device, n, n, model.head_dim, model.dropout):
        how = "as dense attention under a mask, at a dense layer's cost"
        if flex.takes(device, n, n, model.head_dim, 0.0):
            how += f": FlexAttention has no dropout, and model.dropout={model.dropout}"
    return [
        f"attention: {model.attention}, {len(sparse)} of {model.n_layer} layers sparse, {how}",
        f"the last checkpoint gets no Hugging Face files: {hf_refusal(model)}",
    ]

"""Refusals of a run's layout before torch is imported. Standard library only."""

from __future__ import annotations

from conf.errors import UserError
from data_pipeline.config import StageConfig
from data_pipeline.order.geometry import Geometry, batch_geometry
from trainer.config.model import ModelConfig
from trainer.config.optim import Kind
from trainer.config.parallel import Compile, Offload, ParallelConfig, Precision
from trainer.config.pretrain import PretrainConfig
from trainer.config.train import TrainConfig

FP8_MULTIPLE = 16  # torch's fp8 product wants all its dimensions to be multiples of this


def check_ranks(cfg: TrainConfig, world_size: int) -> None:
    """Raises UserError for a combination of ranks, parallelism and model that no kind of training can have."""
    layout = cfg.parallel
    _check_tp(cfg.model, layout.tp, world_size)
    if cfg.optim.kind is Kind.muon:
        _check_muon(layout)
    refusal = compile_refusal(layout)
    if cfg.compile is Compile.on and refusal:
        raise UserError(f"compile=on with {refusal}; give compile=auto or off")
    if cfg.precision is Precision.fp8:
        _check_fp8(cfg.model, layout)
    refusal = recheck_refusal(layout)
    if cfg.guard.recheck_every and refusal:
        raise UserError(f"guard.recheck_every={cfg.guard.recheck_every} with {refusal}; give guard.recheck_every=0")


def check_layout(cfg: PretrainConfig, world_size: int) -> Geometry:
    """Check all that depends on the ranks and the shapes of a run; return the geometry of a full first batch.

    Raises:
        UserError: an impossible combination of world size, parallelism, batch and model.
    """
    layout = cfg.parallel
    check_ranks(cfg, world_size)
    if cfg.precision is Precision.fp8:
        check_fp8_sizes([(f"data.stages: n_ctx at step {stage.step}", stage.n_ctx or 0) for stage in cfg.data.stages])
    n_ctx, tokens_per_step = cfg.model.n_ctx, cfg.tokens_per_step
    geometries = []
    for stage in (StageConfig(0), *cfg.data.stages):
        n_ctx, tokens_per_step = stage.n_ctx or n_ctx, stage.tokens_per_step or tokens_per_step
        if not 0 < n_ctx <= cfg.model.n_ctx:
            raise UserError(f"data.stages: n_ctx={n_ctx} at step {stage.step}: give 1 to model.n_ctx={cfg.model.n_ctx}")
        if layout.sequence_parallel and n_ctx % layout.tp:
            raise UserError(
                f"parallel.sequence_parallel splits n_ctx={n_ctx} (model.n_ctx, or data.stages from step {stage.step} "
                f"on), which parallel.tp={layout.tp} does not divide"
            )
        geometries.append(
            batch_geometry(
                tokens_per_step=tokens_per_step,
                n_ctx=n_ctx,
                micro_batch_size=cfg.micro_batch_size,
                lanes=cfg.data.lanes,
                dp=world_size // layout.tp,
            )
        )
    return geometries[0]


def compile_refusal(layout: ParallelConfig) -> str | None:
    """The reason why this layout's blocks cannot be compiled; None if they can."""
    if layout.tp > 1:
        return f"parallel.tp={layout.tp}: megatron-core's linears break the graph of a block"
    if layout.zero_stage == 3:
        return "parallel.zero_stage=3: DeepSpeed's gathering of weights cannot be traced"
    return None


def recheck_refusal(layout: ParallelConfig) -> str | None:
    """The reason why torch alone cannot compute a micro step a second time; None if it can."""
    if layout.tp > 1:
        return f"parallel.tp={layout.tp}: its forward and backward are collective, one rank's error is everyone's"
    if layout.zero_stage == 3:
        return "parallel.zero_stage=3: weights are complete only inside DeepSpeed's own backward"
    return None


def _check_tp(model: ModelConfig, tp: int, world_size: int) -> None:
    if world_size % tp:
        raise UserError(
            f"parallel.tp={tp} does not divide the {world_size} ranks: "
            f"start a multiple of {tp} ranks, or change parallel.tp"
        )
    if tp > model.n_head:
        raise UserError(
            f"parallel.tp={tp} is more than model.n_head={model.n_head}: a rank would hold no head, "
            f"give parallel.tp of at most {model.n_head}"
        )
    if 4 * model.n_embd % tp:
        fit = [t for t in range(1, 9) if 4 * model.n_embd % t == 0 and t <= model.n_head]
        raise UserError(
            f"4 x model.n_embd={4 * model.n_embd} is not a multiple of parallel.tp={tp}: "
            f"give parallel.tp of {', '.join(map(str, fit))}"
        )


def _check_fp8(model: ModelConfig, layout: ParallelConfig) -> None:
    if layout.tp > 1:
        raise UserError(f"precision=fp8 with parallel.tp={layout.tp}: fp8 is for tp=1, give precision=bf16")
    check_fp8_sizes([("model.n_embd", model.n_embd), ("model.n_ctx", model.n_ctx)])


def check_fp8_sizes(sizes: list[tuple[str, int]]) -> None:
    """Raises UserError for a size, by its name, that the sides of an fp8 product cannot have."""
    for name, size in sizes:
        if size % FP8_MULTIPLE:
            raise UserError(
                f"precision=fp8 multiplies matrices whose sides are multiples of {FP8_MULTIPLE}, which {name}={size} "
                "is not: give precision=bf16"
            )


def _check_muon(layout: ParallelConfig) -> None:
    if layout.tp > 1:
        raise UserError(
            f"optim.kind=muon with parallel.tp={layout.tp}: it would orthogonalise each rank's part of a matrix, "
            "not the matrix; give parallel.tp=1 (parallel.zero_stage=3 splits the memory), or optim.kind=adamw"
        )
    if layout.offload is Offload.cpu:
        raise UserError(
            "optim.kind=muon with parallel.offload=cpu: its matrix products would run on the CPU, for minutes a step; "
            "give parallel.offload=none, or optim.kind=adamw"
        )

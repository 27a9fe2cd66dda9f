"""What can be said of a run's layout before torch is imported. Standard library only."""

from __future__ import annotations

from conf.errors import UserError
from data_pipeline.config import StageConfig
from data_pipeline.order.geometry import Geometry, batch_geometry
from trainer.config.optim import Kind
from trainer.config.parallel import Compile, Offload, Precision
from trainer.config.pretrain import PretrainConfig

FP8_MULTIPLE = 16  # torch's fp8 product wants all its dimensions to be multiples of this


def check_layout(cfg: PretrainConfig, world_size: int) -> Geometry:
    """Everything that can be said of a run's shape before torch is imported; returns that of a full first batch.

    Raises:
        UserError: an impossible combination of world size, parallelism, batch and model.
    """
    tp = cfg.parallel.tp
    if world_size % tp:
        raise UserError(
            f"parallel.tp={tp} does not divide the {world_size} ranks: "
            f"start a multiple of {tp} ranks, or change parallel.tp"
        )
    if tp > cfg.model.n_head:
        raise UserError(
            f"parallel.tp={tp} is more than model.n_head={cfg.model.n_head}: a rank would hold no head, "
            f"give parallel.tp of at most {cfg.model.n_head}"
        )
    if 4 * cfg.model.n_embd % tp:
        fit = [t for t in range(1, 9) if 4 * cfg.model.n_embd % t == 0 and t <= cfg.model.n_head]
        raise UserError(
            f"4 x model.n_embd={4 * cfg.model.n_embd} is not a multiple of parallel.tp={tp}: "
            f"give parallel.tp of {', '.join(map(str, fit))}"
        )
    _check_muon(cfg)
    _check_speed(cfg)
    _check_recheck(cfg)
    n_ctx, tokens_per_step = cfg.model.n_ctx, cfg.tokens_per_step
    found = []
    for stage in (StageConfig(0), *cfg.data.stages):
        n_ctx, tokens_per_step = stage.n_ctx or n_ctx, stage.tokens_per_step or tokens_per_step
        if not 0 < n_ctx <= cfg.model.n_ctx:
            raise UserError(f"data.stages: n_ctx={n_ctx} at step {stage.step}: give 1 to model.n_ctx={cfg.model.n_ctx}")
        if cfg.parallel.sequence_parallel and n_ctx % tp:
            raise UserError(
                f"parallel.sequence_parallel splits n_ctx={n_ctx} (model.n_ctx, or data.stages from step {stage.step} "
                f"on), which parallel.tp={tp} does not divide"
            )
        found.append(
            batch_geometry(
                tokens_per_step=tokens_per_step,
                n_ctx=n_ctx,
                micro_batch_size=cfg.micro_batch_size,
                lanes=cfg.data.lanes,
                dp=world_size // tp,
            )
        )
    return found[0]


def compile_refusal(cfg: PretrainConfig) -> str | None:
    """Why this layout's blocks cannot be compiled; None where they can."""
    if cfg.parallel.tp > 1:
        return f"parallel.tp={cfg.parallel.tp}: megatron-core's linears break the graph of a block"
    if cfg.parallel.zero_stage == 3:
        return "parallel.zero_stage=3: DeepSpeed's gathering of weights cannot be traced"
    return None


def _check_speed(cfg: PretrainConfig) -> None:
    """Raises UserError where `compile` or `precision=fp8` asks for what the layout or the model's widths cannot do."""
    refusal = compile_refusal(cfg)
    if cfg.compile is Compile.on and refusal:
        raise UserError(f"compile=on with {refusal}; give compile=auto or off")
    if cfg.precision is not Precision.fp8:
        return
    if cfg.parallel.tp > 1:
        raise UserError(f"precision=fp8 with parallel.tp={cfg.parallel.tp}: fp8 is for tp=1, give precision=bf16")
    stages = [(f"data.stages: n_ctx at step {stage.step}", stage.n_ctx) for stage in cfg.data.stages]
    for what, size in [("model.n_embd", cfg.model.n_embd), ("model.n_ctx", cfg.model.n_ctx), *stages]:
        if size and size % FP8_MULTIPLE:
            raise UserError(
                f"precision=fp8 multiplies matrices whose sides are multiples of {FP8_MULTIPLE}, which {what}={size} "
                "is not: give precision=bf16"
            )


def _check_recheck(cfg: PretrainConfig) -> None:
    """Raises UserError where a micro step cannot be made a second time by torch alone."""
    every, layout = cfg.guard.recheck_every, cfg.parallel
    cases = {
        f"parallel.tp={layout.tp}: its forward and backward are collective, one rank's error is everyone's": layout.tp
        > 1,
        "parallel.zero_stage=3: weights are there only inside of DeepSpeed's own backward": layout.zero_stage == 3,
    }
    refusal = next((why for why, hit in cases.items() if hit), None)
    if every and refusal:
        raise UserError(f"guard.recheck_every={every} with {refusal}; give guard.recheck_every=0")


def _check_muon(cfg: PretrainConfig) -> None:
    if cfg.optim.kind is not Kind.muon:
        return
    if cfg.parallel.tp > 1:
        raise UserError(
            f"optim.kind=muon with parallel.tp={cfg.parallel.tp}: it would orthogonalise each rank's part of a matrix, "
            "not the matrix; give parallel.tp=1 (parallel.zero_stage=3 splits the memory), or optim.kind=adamw"
        )
    if cfg.parallel.offload is Offload.cpu:
        raise UserError(
            "optim.kind=muon with parallel.offload=cpu: its matrix products would run on the CPU, for minutes a step; "
            "give parallel.offload=none, or optim.kind=adamw"
        )

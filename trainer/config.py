"""What a user may say about a run, and what is refused before a GPU is taken. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from data_pipeline.config import MISSING, DataConfig, Geometry, UserError, batch_geometry


class Norm(Enum):
    pre = "pre"  # GPT-2, GPT-3: LayerNorm before each sub-block, one more after the last
    post = "post"  # GPT-1: LayerNorm after each residual add, none at the end


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # fp32 masters, fp32 gradient accumulation


class Recompute(Enum):
    none = "none"
    full = "full"  # keep a block's input only, run the block again in backward


class ScheduleKind(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"  # warm-up, stable, decay


class Unit(Enum):
    steps = "steps"
    tokens = "tokens"


class Resume(Enum):
    auto = "auto"  # from the run's last checkpoint where there is one, else from the start
    never = "never"  # refuses a run folder that already holds a checkpoint
    must = "must"  # refuses a run folder that holds none


class Tracker(Enum):
    mlflow = "mlflow"
    none = "none"  # metrics.jsonl in the run folder only


@dataclass
class ModelConfig:
    """A GPT decoder. `vocab_size` is the tokenizer's true size; padding for tensor parallelism is derived."""

    name: str = MISSING
    n_layer: int = MISSING
    n_head: int = MISSING
    n_embd: int = MISSING
    n_ctx: int = MISSING
    vocab_size: int = MISSING
    norm: Norm = Norm.pre
    dropout: float = 0.0  # on embeddings, attention weights and residuals
    init_std: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}={getattr(self, key)}: give at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"model.n_embd={self.n_embd} is not a multiple of model.n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout}: give 0 <= dropout < 1")
        for key in ("init_std", "layer_norm_eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"model.{key}={getattr(self, key)}: give a positive number")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass
class ScheduleConfig:
    """The learning rate over the run, in steps or in tokens (`unit`)."""

    kind: ScheduleKind = MISSING
    unit: Unit = Unit.steps
    warmup: int = 0  # linear from 0 over this long
    end: int | None = None  # where the floor is reached; null = the end of the run
    cooldown: int = 0  # wsd only: the linear decay's length before `end`
    floor: float = 0.0  # share of the peak that is left at the end

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UserError(f"optim.schedule.floor={self.floor} is a share of optim.lr: give 0 <= floor <= 1")
        if self.warmup < 0 or self.cooldown < 0 or (self.end is not None and self.end < 1):
            raise UserError(
                f"optim.schedule: warmup={self.warmup}, cooldown={self.cooldown}, end={self.end}: none may be negative"
            )
        if (self.kind is ScheduleKind.wsd) != (self.cooldown > 0):
            raise UserError(
                f"optim.schedule.cooldown={self.cooldown} with kind={self.kind.value}: "
                "a cooldown goes with wsd, and wsd needs one"
            )


@dataclass
class OptimConfig:
    """AdamW; weights of two dimensions or more decay, biases and gains do not."""

    name: str = MISSING
    lr: float = MISSING
    schedule: ScheduleConfig = MISSING
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # global norm; 0 = no clipping

    def __post_init__(self) -> None:
        # nan passes every comparison that is asked the other way round
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf and 0 <= self.grad_clip < math.inf):
            raise UserError(
                f"optim: lr={self.lr} must be positive, weight_decay={self.weight_decay} and "
                f"grad_clip={self.grad_clip} not negative, all finite"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 < self.eps < math.inf):
            raise UserError(
                f"optim: 0 <= beta1={self.beta1} < 1, 0 <= beta2={self.beta2} < 1 and eps={self.eps} > 0 must hold"
            )


@dataclass
class ParallelConfig:
    """How the model lies on the ranks; dp = world_size / tp."""

    name: str = MISSING
    tp: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    recompute: Recompute = Recompute.none

    def __post_init__(self) -> None:
        if self.tp < 1:
            raise UserError(f"parallel.tp={self.tp}: give at least 1")
        if self.zero_stage not in (1, 2, 3):
            raise UserError(
                f"parallel.zero_stage={self.zero_stage}: give 1, 2 or 3 (stage 0 is wrong in bf16; 1 costs nothing)"
            )
        if self.sequence_parallel and self.tp == 1:
            raise UserError(
                "parallel.sequence_parallel=true with parallel.tp=1: there is nothing to split, "
                "set it to false or tp to 2 or more"
            )


@dataclass
class RunConfig:
    name: str = MISSING
    dir: str = MISSING  # checkpoints, metrics, the frozen config: all that a restart needs


@dataclass
class EvalConfig:
    every: int = MISSING  # steps; 0 = only at the end
    windows: int | None = None  # validation windows used, from the first on; null = all

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"eval.every={self.every}: give a number of steps, or 0 to validate only at the end")
        if self.windows is not None and self.windows < 1:
            raise UserError(f"eval.windows={self.windows}: give at least 1, or null for all")


@dataclass
class CheckpointConfig:
    every_steps: int = MISSING  # 0 = only at the end
    every_minutes: float = 0.0  # 0 = by steps alone; otherwise whichever comes first
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # and the one with the lowest validation loss

    def __post_init__(self) -> None:
        if self.every_steps < 0 or not 0 <= self.every_minutes < math.inf or self.keep < 1:
            raise UserError(
                f"checkpoint: every_steps={self.every_steps} and every_minutes={self.every_minutes} must be 0 or more "
                f"and finite, keep={self.keep} at least 1"
            )


@dataclass
class TrackingConfig:
    name: Tracker = MISSING
    uri: str | None = None  # mlflow: where the server or the database is
    experiment: str = "gradus"


@dataclass
class PretrainConfig:
    """`python -m trainer.pretrain`: a language model from shards."""

    run: RunConfig = MISSING
    model: ModelConfig = MISSING
    optim: OptimConfig = MISSING
    data: DataConfig = MISSING
    parallel: ParallelConfig = MISSING
    eval: EvalConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    tracking: TrackingConfig = MISSING
    tokens_per_step: int = MISSING  # tokens in one optimizer update, over all ranks
    micro_batch_size: int = MISSING  # sequences per rank per micro step; grad_accum_steps is derived
    max_steps: int = MISSING
    precision: Precision = MISSING
    seed: int = 1337  # of the weights, the data's order and dropout
    deterministic: bool = False  # GPU: bit-exact resume, at some cost of speed; CPU is always exact
    resume: Resume = Resume.auto
    log_every: int = 1  # steps

    def __post_init__(self) -> None:
        for key in ("tokens_per_step", "micro_batch_size", "max_steps", "log_every"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: give at least 1")


@dataclass
class GenerateConfig:
    """`python -m trainer.generate`: continue prompts with a checkpoint of any layout."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    prompt: str | None = None
    prompt_file: str | None = None  # one prompt a line; "-" = standard input
    prompt_ids: list[list[int]] | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0  # 0 = greedy
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        given = [k for k in ("prompt", "prompt_file", "prompt_ids") if getattr(self, k) is not None]
        if len(given) != 1:
            raise UserError(
                f"give exactly one of prompt, prompt_file and prompt_ids; given: {', '.join(given) or 'none'}"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: give at least 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give 0 < top_p <= 1, or null")


def check_layout(cfg: PretrainConfig, world_size: int) -> Geometry:
    """Everything that can be said of a run before torch is imported.

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
        raise UserError(f"4 x model.n_embd={4 * cfg.model.n_embd} is not a multiple of parallel.tp={tp}")
    if cfg.parallel.sequence_parallel and cfg.model.n_ctx % tp:
        raise UserError(
            f"parallel.sequence_parallel splits model.n_ctx={cfg.model.n_ctx}, which parallel.tp={tp} does not divide"
        )
    return batch_geometry(
        tokens_per_step=cfg.tokens_per_step,
        n_ctx=cfg.model.n_ctx,
        micro_batch_size=cfg.micro_batch_size,
        lanes=cfg.data.lanes,
        dp=world_size // tp,
    )

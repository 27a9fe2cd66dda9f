"""The optimizer and its learning rate. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from conf.errors import MISSING, UserError


class ScheduleKind(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"  # warm-up, stable, decay


class Kind(Enum):
    adamw = "adamw"
    muon = "muon"  # for the blocks' matrices; AdamW for embeddings, biases and gains


class Unit(Enum):
    steps = "steps"
    tokens = "tokens"


@dataclass
class ScheduleConfig:
    """The learning rate over the run, in steps or in tokens (`unit`)."""

    kind: ScheduleKind = MISSING
    unit: Unit = Unit.steps  # of warmup, end and cooldown
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
    """AdamW, or Muon and AdamW; weights of two dimensions or more decay, biases and gains do not."""

    name: str = MISSING  # the choice of optim=
    lr: float = MISSING  # the peak of the learning rate
    schedule: ScheduleConfig = MISSING
    beta1: float = 0.9  # Adam's decay of the mean
    beta2: float = 0.95  # Adam's decay of the square
    eps: float = 1e-8  # Adam's, added to the root
    weight_decay: float = 0.1  # decoupled, times the learning rate
    grad_clip: float = 1.0  # global norm, of the gradient before any momentum; 0 = no clipping
    kind: Kind = Kind.adamw
    muon_lr: float | None = None  # the peak for the matrices, with lr's schedule; lr is AdamW's
    momentum: float | None = None  # muon only

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
        self._check_muon()

    def _check_muon(self) -> None:
        lr, momentum = self.muon_lr, self.momentum
        if self.kind is Kind.adamw:
            if lr is not None or momentum is not None:
                raise UserError(
                    f"optim.kind=adamw with optim.muon_lr={lr} and optim.momentum={momentum}: they are Muon's, "
                    "give optim.kind=muon or leave both out"
                )
        elif lr is None or momentum is None or not (0 < lr < math.inf and 0 <= momentum < 1):
            raise UserError(
                f"optim.kind=muon: optim.muon_lr={lr} must be positive and 0 <= optim.momentum={momentum} < 1 hold "
                "(optim=muon has both)"
            )

"""Settings of precision, compilation and the layout of a model on ranks. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

from conf.errors import MISSING, UserError

AUTO = "auto"


T = TypeVar("T")


if TYPE_CHECKING:  # `trainer.plan.choose.settle` fills what is open before anything else reads it
    Open = Annotated[T, "null: chosen by the plan"]
    IntOrAuto = int
else:
    Open = Optional
    IntOrAuto = int | str


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # fp32 masters, fp32 gradient accumulation
    fp8 = "fp8"  # bf16, with the blocks' matrix products in fp8; tp=1


class Compile(Enum):
    auto = "auto"  # on where it helps and can be: a GPU, tp=1, ZeRO-1 or 2
    on = "on"
    off = "off"


class Recompute(Enum):
    none = "none"
    selective = "selective"  # make LayerNorms and GELUs again in backward, no matrix product
    full = "full"  # keep a block's input only, run the block again in backward


class Offload(Enum):
    none = "none"
    cpu = "cpu"  # masters and moments, and under ZeRO-3 the weights, in host memory; AdamW runs on the CPU


@dataclass
class ParallelConfig:
    """The split of the model over the ranks; dp = world_size / tp."""

    name: str = MISSING  # the choice of parallel=
    tp: Open[int] = 1  # null here and below: the plan chooses
    sequence_parallel: Open[bool] = False  # with tp: LayerNorms and dropout are split over the sequence
    zero_stage: Open[int] = 1  # 1 splits the optimizer, 2 also the gradients, 3 also the weights
    recompute: Open[Recompute] = Recompute.none
    offload: Open[Offload] = Offload.none

    def __post_init__(self) -> None:
        if self.tp is not None and self.tp < 1:
            raise UserError(f"parallel.tp={self.tp}: give at least 1")
        if self.zero_stage not in (1, 2, 3, None):
            raise UserError(
                f"parallel.zero_stage={self.zero_stage}: give 1, 2 or 3 (stage 0 is wrong in bf16; 1 costs nothing)"
            )
        if self.sequence_parallel and self.tp == 1:
            raise UserError(
                "parallel.sequence_parallel=true with parallel.tp=1: there is nothing to split, "
                "set it to false or tp to 2 or more"
            )

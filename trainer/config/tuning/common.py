"""The settings of tuning a model that is trained already, on examples. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.errors import MISSING, UserError
from trainer.config.parallel import Compile
from trainer.config.train import TrainConfig, at_least_one, profiled_steps


@dataclass
class HeldOutConfig:
    """The examples that a run validates with, and how often."""

    path: str | None = None  # files in the form of the examples; null = a part of them is held out
    fraction: float = 0.0  # of the examples, chosen by their text: equal ones are on one side; 0 = none
    every: int = 0  # steps between validations; 0 = only at the end
    patience: int = 0  # validations in a row without a new lowest loss after which the run ends; 0 = any number

    def __post_init__(self) -> None:
        if self.path is not None and self.fraction:
            raise UserError(
                f"held_out.path={self.path} and held_out.fraction={self.fraction}: give one of them, for the examples "
                "to validate with are those of the path, or a part of the others"
            )
        if not 0 <= self.fraction < 1:
            raise UserError(f"held_out.fraction={self.fraction}: give a share of the examples below 1, or 0 for none")
        if self.every < 0 or self.patience < 0:
            raise UserError(
                f"held_out.every={self.every} and held_out.patience={self.patience}: give numbers that are not negative"
            )
        if self.patience and not self.every:
            raise UserError(
                f"held_out.patience={self.patience} with held_out.every=0, which validates only at the end: give "
                "held_out.every=N, or held_out.patience=0"
            )
        if (self.every or self.patience) and not self.given:
            raise UserError(f"held_out.every={self.every} without examples: give held_out.path or held_out.fraction")

    @property
    def given(self) -> bool:
        return self.path is not None or self.fraction > 0


@dataclass
class TuneConfig(TrainConfig):
    """All tunings start from the weights of `init_from`; its tokenizer is the run's."""

    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    batch_size: int = MISSING  # rows, comparisons or labelled examples in one optimizer update, over all ranks
    epochs: int = 0  # times that each example is seen, instead of max_steps; 0 = as max_steps says

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "batch_size")
        if self.init_from is None:
            raise UserError("init_from is not given: a tuning starts from the weights of a checkpoint or run folder")

    def check_steps(self) -> None:
        if min(self.epochs, self.max_steps) < 0 or (self.epochs > 0) == (self.max_steps > 0):
            raise UserError(
                f"epochs={self.epochs} and max_steps={self.max_steps}: give one of them, of at least 1, and 0 for the "
                "other"
            )
        if self.max_steps:
            profiled_steps(self.profile, self.max_steps)


def refuse_compile(compile_: Compile) -> None:
    """Raises UserError unless nothing is compiled: for tunings whose batches have many shapes."""
    if compile_ is not Compile.off:
        raise UserError(
            f"compile={compile_.value}: each number of rows and each length would be compiled anew, and too many end "
            "the run: give compile=off"
        )

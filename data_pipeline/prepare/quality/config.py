"""Options of the quality model, which tells good documents from raw ones. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING, UserError
from data_pipeline.files import check_output
from data_pipeline.prepare.recipe_config import check_alpha


@dataclass
class QualityTrainConfig:
    """`python -m data_pipeline.quality train`: learn to tell good documents from raw ones."""

    positives: list[str] = MISSING  # JSON lines of good documents: each a file, a folder (OUTPUT/documents), a glob
    negatives: list[str] = MISSING  # the same of raw ones
    output: str = MISSING  # FILE.safetensors
    n_features: int = 262144  # that words are hashed to
    held_out: float = 0.1  # share of the documents, by a hash of their ids, that the model is measured on alone
    max_documents: int = 100_000  # of each kind, those with the lowest hashes: each takes about 6 kB of memory
    inverse_penalty: float = 10.0  # sklearn's C: the smaller, the closer to 0 are the coefficients
    seed: int = 1337  # of the hashes

    def __post_init__(self) -> None:
        check_output(self.output)
        if not self.output.endswith(".safetensors"):
            raise UserError(f"output={self.output}: give the name of a file that ends in .safetensors")
        if not 1 <= self.n_features <= 1 << 26:
            raise UserError(f"n_features={self.n_features}: give 1 to {1 << 26}")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out={self.held_out}: give a share of the documents, above 0 and below 1")
        if self.max_documents < 1:
            raise UserError(f"max_documents={self.max_documents}: give at least 1")
        if not 0 < self.inverse_penalty < float("inf"):
            raise UserError(f"inverse_penalty={self.inverse_penalty}: give a number above 0")


@dataclass
class QualityEvaluateConfig:
    """`python -m data_pipeline.quality evaluate`: measure a model, and the shares that the Pareto rule keeps."""

    classifier: str = MISSING  # what `python -m data_pipeline.quality train` made
    positives: list[str] = MISSING  # as in `train`; the same may be given again
    negatives: list[str] = MISSING  # as in `train`
    output: str = MISSING  # folder that receives evaluation.json, roc.png and scores.png
    held_out: bool = True  # only documents that the training held out by their ids; false = all
    max_documents: int = 100_000  # of each kind, those with the lowest hashes
    alpha: float = 9.0  # of the Pareto rule
    seed: int = 1337  # of the rule's random numbers

    def __post_init__(self) -> None:
        check_output(self.output)
        check_alpha("alpha", self.alpha)
        if self.max_documents < 1:
            raise UserError(f"max_documents={self.max_documents}: give at least 1")

"""The step of a recipe that scores documents and keeps them by the Pareto rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.quality.model import Model, keeps
from data_pipeline.prepare.recipe_config import QualityConfig
from data_pipeline.prepare.step import Step


class Quality(Step):
    """Gives each document its `score` and keeps it by the Pareto rule.

    Raises:
        UserError: with the first document, no model at `cfg.model`, or a damaged one.
    """

    batch = 64

    def __init__(self, cfg: QualityConfig) -> None:
        super().__init__("quality")
        self.cfg = cfg

    @cached_property
    def model(self) -> Model:
        return Model.load(Path(self.cfg.model))

    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        for doc, score in zip(docs, self.model.score([doc.text for doc in docs]), strict=True):
            doc.metadata["score"] = score
        return [None if keeps(self.cfg, doc.id, doc.metadata["score"]) else "quality" for doc in docs]

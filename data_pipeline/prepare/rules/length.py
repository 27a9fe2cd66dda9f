"""The length of documents."""

from __future__ import annotations

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import LengthConfig
from data_pipeline.prepare.step import Step


class Length(Step):
    """Drops documents of too few or too many characters, or too few tokens (metadata["tokens"], counted before)."""

    def __init__(self, config: LengthConfig) -> None:
        super().__init__("length")
        self.config = config

    def reason(self, doc: Document) -> str | None:
        c, size = self.config, len(doc.text)
        if size < c.min_chars:
            return "too few characters"
        if c.max_chars is not None and size > c.max_chars:
            return "too many characters"
        if c.min_tokens and doc.metadata["tokens"] < c.min_tokens:
            return "too few tokens"
        return None

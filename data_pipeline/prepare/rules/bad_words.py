"""C4's list of bad words (Raffel et al. 2020, section 2.2), from a file of the user's."""

from __future__ import annotations

import re

from xxhash import xxh3_64_intdigest

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import BadWordsConfig
from data_pipeline.prepare.rules import lists
from data_pipeline.prepare.step import Step

WORD = re.compile(r"\w+")


class BadWords(Step):
    """Drops a document that has a phrase of the list between characters that are no part of a word, in any case: the
    decision of datatrove's C4BadWordsFilter in English. The share `keep` of them stays, chosen by a hash of the
    document's id.

    Raises:
        UserError: the file cannot be read, or has no word.
    """

    def __init__(self, config: BadWordsConfig) -> None:
        super().__init__("bad_words")
        self.keep = config.keep
        every = sorted(lists.words(config.file, "bad_words.file"))
        self.words = frozenset(phrase for phrase in every if WORD.fullmatch(phrase))
        self.phrases: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # by their first word; "" if that is a mark
        for phrase in sorted(set(every) - self.words):
            first = WORD.match(phrase)
            pattern = re.compile(rf"(?:\W|^){re.escape(phrase)}(?:\W|$)")
            self.phrases.setdefault(first.group() if first else "", []).append((phrase, pattern))

    def reason(self, doc: Document) -> str | None:
        return "document_removed_with_badwords" if self.has_one(doc.text) and not self.stays(doc) else None

    def has_one(self, text: str) -> bool:
        small = text.lower()
        words = {"", *WORD.findall(small)}
        if not self.words.isdisjoint(words):
            return True
        near = (pair for first in self.phrases.keys() & words for pair in self.phrases[first])
        return any(phrase in small and pattern.search(small) for phrase, pattern in near)

    def stays(self, doc: Document) -> bool:
        return xxh3_64_intdigest(f"bad words {doc.id}".encode("utf-8", "surrogatepass")) < self.keep * 2**64

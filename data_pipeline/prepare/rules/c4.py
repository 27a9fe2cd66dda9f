"""The rules of C4 (Raffel et al. 2020, section 2.2), with datatrove's decisions, names and text."""

from __future__ import annotations

import re

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import C4Config
from data_pipeline.prepare.step import Step
from data_pipeline.prepare.text.words import count_sentences

CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
END_OF_SENTENCE = (".", "?", "!", '"', "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class C4(Step):
    """Drops lines that are no sentences, and documents with too few left; the text is the lines that stay."""

    rewrites = True

    def __init__(self, config: C4Config) -> None:
        super().__init__("c4")
        self.config = config

    def reason(self, doc: Document) -> str | None:
        c = self.config
        cites = c.citations and "[" in doc.text
        seen = (CITATION.sub("", doc.text) if cites else doc.text).lower()
        lorem = c.lorem_ipsum and "lorem ipsum" in seen
        curly = c.curly_bracket and "{" in seen
        phrases = tuple(p for p in (("javascript",) * c.javascript + POLICY * c.policy) if p in seen)
        kept: list[str] = []
        for raw in doc.text.splitlines():
            line = raw.strip()
            if len(line) > c.max_word_length and any(len(word) > c.max_word_length for word in line.split()):
                continue
            few = len(line.split(None, c.min_words_per_line)) < c.min_words_per_line
            if cites:
                line = CITATION.sub("", line)
            if few or (c.terminal_punctuation and (not line.endswith(END_OF_SENTENCE) or line.endswith("..."))):
                continue
            if lorem or curly or phrases:
                small = line.lower()
                if lorem and "lorem ipsum" in small:
                    return "lorem_ipsum"
                if "javascript" in phrases and "javascript" in small:
                    continue
                if curly and "{" in line:
                    return "curly_bracket"
                if any(phrase in small for phrase in phrases):
                    continue
            kept.append(line)
        # a line is at least one sentence, so that most documents need no look into their lines
        if len(kept) < c.min_sentences and sum(map(count_sentences, kept)) < c.min_sentences:
            return "too_few_sentences"
        doc.text = "\n".join(kept).strip()
        return None

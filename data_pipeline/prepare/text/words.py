"""The words of a document, cut once for all the rules that count them.

They are the words that datatrove's rules count (spaCy's English ones, see `english`), but a run of non-blanks is cut
only once: texts repeat their words, so that a table has nearly all of them.
"""

from __future__ import annotations

import unicodedata
from array import array
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION

from data_pipeline.prepare.text import english

TABLE = 1 << 17  # runs that a process remembers, about 35 MB
LONGEST_RUN = 40  # characters of those

STOPS = frozenset(TERMINAL_PUNCTUATION)  # of datatrove: the characters that end a sentence, in all scripts


class RunTable(dict[str, tuple[tuple[str, ...], bytes]]):
    """{run of non-blanks: (its words, their `kind`s as C's unsigned ints)}, filled by use."""

    def __missing__(self, run: str) -> tuple[tuple[str, ...], bytes]:
        words = english.pieces(run)
        value = words, array("I", map(kind, words)).tobytes()
        if len(run) <= LONGEST_RUN:
            if len(self) >= TABLE:
                self.clear()
            self[run] = value
        return value


def kind(word: str) -> int:
    """4 * its length, + 2 if it has a letter, + 1 if it is more than punctuation."""
    if word.isalpha():
        return len(word) * 4 + 3
    return len(word) * 4 + any(map(str.isalpha, word)) * 2 + (not PUNCTUATION_SET.issuperset(word))


_table = RunTable()


class Text:
    """A document's words, and arrays of one number a word."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.runs = text.split()
        self._cut = list(map(_table.__getitem__, self.runs))

    @cached_property
    def words(self) -> list[str]:
        """The words of datatrove's `split_into_words` in English."""
        return list(chain.from_iterable([words for words, _ in self._cut]))

    @cached_property
    def kinds(self) -> np.ndarray:
        return np.frombuffer(b"".join([kinds for _, kinds in self._cut]), np.uintc).astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters, [words]."""
        return self.kinds >> 2

    @cached_property
    def has_letter(self) -> np.ndarray:
        return self.kinds & 2 != 0

    @cached_property
    def is_word(self) -> np.ndarray:
        """Marks of words that are more than punctuation, [words]."""
        return self.kinds & 1 != 0


@lru_cache(maxsize=1)  # a document goes through all rules before the next one comes
def read(text: str) -> Text:
    return Text(text)


def count_sentences(text: str) -> int:
    """The number of sentences by datatrove's `split_into_sentences`: one ends after a stop, before the next word that
    is no punctuation."""
    words = Text(text).words
    blanks = text[len(text.rstrip()) :]
    if words and blanks not in ("", " "):
        words.append(blanks)  # spaCy's word for more than one blank, with which a sentence begins
    sentences, stopped = 1, False
    for word in words:
        if word in STOPS:
            stopped = True
        elif stopped and not all(unicodedata.category(c)[0] == "P" for c in word):
            sentences, stopped = sentences + 1, False
    return sentences

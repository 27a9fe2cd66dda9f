"""The n-grams of evaluation sets, and a search for them in texts (Brown et al. 2020, appendix C).

An example is a line of JSON, its fields `text_keys` joined by a line break (a list of strings by spaces), or a
paragraph of a .txt file; blank lines part paragraphs. Words are in `WordForm.bare`: lower-cased, parted by whitespace,
without punctuation.

Two kinds of n-grams are searched. Those of `cfg.ngram` words of all sets are cut out of documents (decontaminate.py).
Those of `EvaluationSet.n` words say which examples of that set are dirty: n is the 5th percentile of its examples'
lengths in words, between 8 and 13. An example with fewer words than n has no n-gram, and no verdict.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.errors import UserError, of_nature
from data_pipeline.corpus.document import field_of
from data_pipeline.corpus.inputs import Input, files_at
from data_pipeline.corpus.kinds import LINES, TEXT, charset_of, kind_of
from data_pipeline.corpus.lines import content
from data_pipeline.corpus.read import MAX_FILE, head_of
from data_pipeline.prepare.recipe_config import DecontaminateConfig
from data_pipeline.prepare.text.hashing import Joined, WordForm, Words, blocks, hashes, joined, ngrams

PERCENTILE, MIN_N, MAX_N = 5, 8, 13  # of the examples' lengths; between which n lies
_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n")


class Table:
    """Sorted hashes, and a bit map that turns most others away at once."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = np.unique(keys)
        bits = min(26, max(10, (16 * len(self.keys)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(1 << bits, bool)
        self._seen[self.keys >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the `hashes` [n] uint64 that are keys, indices of those keys), both [hits] int64."""
        maybe = np.flatnonzero(self._seen[hashes >> self._shift])
        index = np.searchsorted(self.keys, hashes[maybe])
        hit = index < len(self.keys)
        hit[hit] = self.keys[index[hit]] == hashes[maybe[hit]]
        return maybe[hit], index[hit]


@dataclass(frozen=True)
class EvaluationSet:
    """Examples in order: `lengths` in words [examples]; the hashes [k] of all n-grams of `n` words, each in example
    `of` [k]."""

    name: str
    n: int
    lengths: np.ndarray
    grams: np.ndarray
    of: np.ndarray


class Hits(NamedTuple):
    """n-grams in texts, each [k] int64: number of the text, the n-gram's id, its characters [start, end) there."""

    of: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Grams:
    """The n-grams of all sets. An n-gram's id is its index in the tables put in a row, the shortest n-grams' first."""

    def __init__(self, sets: list[EvaluationSet], ngram: int, removed: np.ndarray) -> None:
        self.sets = sets
        self.ngram = ngram
        parts = {n: [s.grams for s in sets if s.n == n] for n in {s.n for s in sets}}
        parts[ngram] = [*parts.get(ngram, []), removed]
        self.tables = {n: Table(np.concatenate(parts[n])) for n in sorted(parts)}
        sizes = [len(table.keys) for table in self.tables.values()]
        self.first = dict(zip(self.tables, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.size = sum(sizes)

    @classmethod
    def load(cls, cfg: DecontaminateConfig) -> Grams:
        """Raises UserError: no such file, one that is no evaluation set, or one without any of `text_keys`."""
        files = [file for path in cfg.sets for file in _files(path)]
        sets, removed = [], [np.empty(0, np.uint64)]
        for file in files:
            texts = _examples(file, cfg)
            words, of = hashes(texts, WordForm.bare)
            lengths = np.bincount(of, minlength=len(texts))
            if not lengths.any():
                raise UserError(f"decontaminate.sets: no word in {file.path}: leave it out")
            n = int(np.clip(np.percentile(lengths[lengths > 0], PERCENTILE, method="lower"), MIN_N, MAX_N))
            sets.append(EvaluationSet(str(file.path), n, lengths, *_inside(words, of, n)))
            removed.append(_inside(words, of, cfg.ngram)[0])
        return cls(sets, cfg.ngram, np.concatenate(removed))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tables: counts that were made with other tables do not fit."""
        digest = hashlib.sha256()
        for n, table in self.tables.items():
            digest.update(f"{n} {len(table.keys)} ".encode() + table.keys.astype("<u8").tobytes())
        return digest.hexdigest()

    def ids_in(self, texts: Sequence[str]) -> np.ndarray:
        """Ids [k] of the n-grams that are in the texts: each once for each text that has it."""
        hits = self.hits(texts, self.tables)
        return np.unique(hits.of * self.size + hits.ids) % self.size

    def hits(self, texts: Sequence[str], lengths: Iterable[int]) -> Hits:
        """The n-grams of these lengths that are in the texts, in order."""
        hits = [Hits(*[np.empty(0, np.int64)] * 4)]
        hits += [some for group in joined(texts) for some in self._hits_of(group, set(lengths))]
        return Hits(*map(np.concatenate, zip(*hits, strict=True)))

    def _hits_of(self, group: Joined, lengths: set[int]) -> Iterator[Hits]:
        """The hits of each block, which begins with the last words of the block before: n-grams lie across blocks.

        An n-gram across two texts does not count.
        """
        words = Words(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        for block in blocks(group.text, WordForm.bare):
            keep = max(0, len(words.hashes) - max(lengths) + 1)
            words = Words(*(np.concatenate((old[keep:], new)) for old, new in zip(words, block, strict=True)))
            for n, grams in ngrams(words.hashes, lengths):
                first, index = self.tables[n].find(grams)
                of, starts, ends = group.of(words.starts[first]), words.starts[first], words.ends[first + n - 1]
                inside = ends < group.starts[of + 1]
                of, offsets = of[inside], group.starts[of[inside]]
                yield Hits(
                    group.first + of, self.first[n] + index[inside], starts[inside] - offsets, ends[inside] - offsets
                )


def _inside(words: np.ndarray, of: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, numbers of their texts) [k] of the n-grams of `n` words that lie in one text."""
    (_, grams), firsts = next(ngrams(words, [n])), of[: max(0, len(of) - n + 1)]
    inside = firsts == of[n - 1 :]
    return grams[inside], firsts[inside]


def _files(path: str) -> list[Input]:
    files = files_at(path, "decontaminate.sets")
    if not files:
        raise UserError(f"decontaminate.sets={path}: no file there: name a file, a folder or a glob with files")
    for file in files:
        kind = kind_of(head_of(file), file.name)
        if kind != LINES and (kind != TEXT or ".txt" not in file.path.suffixes):
            raise UserError(
                f"decontaminate.sets: {file.path} is {'no .txt' if kind == TEXT else kind}: give .txt files and JSON "
                f"lines; a glob chooses among others"
            )
    return files


def _examples(file: Input, cfg: DecontaminateConfig) -> list[str]:
    """The texts of a set; "" for an example that has none of `text_keys`."""
    try:
        text = _read(file.path)
        if kind_of(head_of(file), file.name) == TEXT:
            return [part for part in _PARAGRAPHS.split(text) if part.strip()]
        bodies = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as e:
        message = f"decontaminate.sets: {file.path}: cannot be read ({e}): give JSON lines or UTF-8 text"
        raise of_nature(e, message) from None
    texts = [_text(body, cfg.text_keys) for body in bodies]
    if not any(texts):
        seen = sorted(bodies[0]) if bodies and isinstance(bodies[0], dict) else "no JSON object"
        raise UserError(f"decontaminate.text_keys={cfg.text_keys}: none is in {file.path}, which has {seen}")
    return texts


def _read(path: Path) -> str:
    held = bytearray()
    with path.open("rb") as raw:
        for chunk in content(raw, path.name):
            held += chunk
            if len(held) > MAX_FILE:
                raise ValueError(f"more than {MAX_FILE:,} bytes")
    return held.decode(charset_of(held)).removeprefix("\ufeff").replace("\r\n", "\n")


def _text(body: object, keys: list[str]) -> str:
    values = [field_of(body, key) for key in keys]
    lines = [" ".join(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for v in values]
    return "\n".join(line for line in lines if isinstance(line, str))

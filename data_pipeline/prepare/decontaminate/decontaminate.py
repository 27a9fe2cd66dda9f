"""Decontamination as in GPT-3's appendix C (Brown et al. 2020): evaluation text is cut out, its examples are judged.

First `Overlaps` counts the documents that each n-gram of the sets (sets.py) occurs in; counts of parts add up. Then
`Decontaminate` cuts each 13-gram that is in `max_documents` of them or fewer out of the documents, with 200 characters
on each side; `report` says which examples the documents held before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError, of_nature
from data_pipeline.corpus.document import Document
from data_pipeline.files import publish
from data_pipeline.prepare.decontaminate.sets import load_grams
from data_pipeline.prepare.recipe_config import DecontaminateConfig
from data_pipeline.prepare.step import Step
from data_pipeline.text.grams import Grams

BATCH = 64  # documents that are searched together
SUFFIX = ".counts.safetensors"


class Overlaps:
    """Numbers of documents that each n-gram occurs in: `counts` [grams.size] int64, by id."""

    def __init__(self, grams: Grams) -> None:
        self.grams = grams
        self.counts = np.zeros(grams.size, np.int64)

    def count(self, texts: Iterable[str]) -> None:
        following = iter(texts)
        while some := list(islice(following, BATCH)):
            np.add.at(self.counts, self.grams.ids_in(some), 1)

    def save(self, path: Path) -> None:
        """Publish the counts, as PATH.counts.safetensors."""
        from safetensors.numpy import save

        publish(path.with_name(path.name + SUFFIX), save({"counts": self.counts}, {"grams": self.grams.fingerprint}))

    @classmethod
    def load(cls, grams: Grams, folder: Path) -> Overlaps:
        """The sum of all counts that were saved in a folder.

        Raises:
            UserError: there are none, or of other evaluation sets, or damaged ones.
        """
        from safetensors import SafetensorError, safe_open

        overlaps, paths = cls(grams), sorted(folder.glob(f"*{SUFFIX}"))
        for path in paths:
            try:
                with safe_open(path, framework="np") as file:
                    if (file.metadata() or {}).get("grams") != grams.fingerprint:
                        raise ValueError("counted for other evaluation sets")
                    overlaps.counts += file.get_tensor("counts")
            except (OSError, SafetensorError, ValueError, TypeError) as e:
                raise of_nature(e, f"{path}: {e}: delete {folder} and count again") from None
        if not paths:
            raise UserError(f"{folder}: no *{SUFFIX} there: count the evaluation sets' n-grams first")
        return overlaps


class Decontaminate(Step):
    """Cuts evaluation text out of documents; `overlaps` is the folder with the counts of all documents.

    A document without a match stays as it is. The pieces of another one between the cuts are stripped of white space.
    A document of more than `max_pieces` pieces is dropped, then pieces of fewer than `min_chars` characters are.
    One piece that is left is the document, shorter; several are documents ID#1, ID#2, ... instead of it.

    Raises:
        UserError: with the first document, as `load_grams` and `Overlaps.load`.
    """

    batch = BATCH

    def __init__(self, cfg: DecontaminateConfig, overlaps: Path) -> None:
        super().__init__("decontaminate")
        self.cfg = cfg
        self.overlaps = overlaps
        self._more: dict[int, list[Document]] = {}  # pieces after the first one, by the id() of the document

    @cached_property
    def _grams(self) -> Grams:
        return load_grams(self.cfg)

    @cached_property
    def _common(self) -> np.ndarray:
        return Overlaps.load(self._grams, self.overlaps).counts > self.cfg.max_documents

    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        hits = self._grams.hits([doc.text for doc in docs], [self.cfg.ngram])
        rare = ~self._common[hits.ids]
        of, starts, ends = hits.of[rare], hits.starts[rare], hits.ends[rare]
        bounds = np.searchsorted(of, np.arange(len(docs) + 1)).tolist()
        return [self._cut(doc, starts[a:b], ends[a:b]) for doc, (a, b) in zip(docs, pairwise(bounds), strict=True)]

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for doc in super().run(data, rank, world_size):
            more = self._more.pop(id(doc), [])
            yield doc
            for piece in more:
                self.report.given.count(piece)
                self.report.split += 1
                yield piece

    def _cut(self, doc: Document, starts: np.ndarray, ends: np.ndarray) -> str | None:
        if not len(starts):
            return None
        pieces = between(doc.text, starts, ends, self.cfg.window)
        if len(pieces) > self.cfg.max_pieces:
            return "in too many pieces"
        left = [piece for piece in pieces if len(piece) >= self.cfg.min_chars]
        if not left:
            return "nothing left"
        more = [Document(t, f"{doc.id}#{k}", metadata=dict(doc.metadata)) for k, t in enumerate(left[1:], 2)]
        if more:
            doc.id += "#1"
            self._more[id(doc)] = more
        doc.text = left[0]
        self.count_tokens([doc, *more])
        return None


def between(text: str, starts: np.ndarray, ends: np.ndarray, window: int) -> list[str]:
    """Pieces of a text outside [start - window, end + window) of each match, without blank ones.

    `starts` and `ends` [k] ascend.
    """
    low, high = np.maximum(starts - window, 0), np.minimum(ends + window, len(text))
    apart = low[1:] > high[:-1]
    lows, highs = low[np.r_[True, apart]].tolist(), high[np.r_[apart, True]].tolist()
    pieces = [text[a:b].strip() for a, b in zip([0, *highs], [*lows, len(text)], strict=True)]
    return [piece for piece in pieces if piece]


def report(overlaps: Overlaps, cfg: DecontaminateConfig) -> dict[str, Any]:
    """Counts of evaluation examples in the documents before anything was cut out.

    `sets`: n of each set, and its examples: dirty if one of its n-grams is in a document, short if it has fewer than n
    words, else clean; the first two by number, from 0. `too_short_to_cut`: those with fewer words than `ngram`.
    """
    grams = overlaps.grams
    sets = {}
    for s in grams.sets:
        dirty = grams.dirty(s, overlaps.counts > 0)
        short = s.lengths < s.n
        sets[s.name] = {
            "n": s.n,
            "examples": len(s.lengths),
            "clean": int((~dirty & ~short).sum()),
            "dirty": int(dirty.sum()),
            "short": int(short.sum()),
            "too_short_to_cut": int((s.lengths < cfg.ngram).sum()),
            "dirty_examples": np.flatnonzero(dirty).tolist(),
            "short_examples": np.flatnonzero(short).tolist(),
        }
    first = grams.first[cfg.ngram]
    cut = overlaps.counts[first : first + len(grams.tables[cfg.ngram].keys)]
    common = int((cut > cfg.max_documents).sum())
    about = {"words": cfg.ngram, "of_the_sets": len(cut), "in_documents": int((cut > 0).sum()), "common": common}
    return {"ngrams": about, "sets": sets}

"""The decision which duplicates are dropped, over the keys of all parts.

First documents of one URL, of what is left documents of one text, of what is left documents that are nearly the same:
all that are linked, link by link, are one group. One document of each group stays: the one of the best quality score,
then of the earliest date, then the first. If a member is in another corpus, all of this corpus are dropped, and the
other corpus stays as it is.

Memory: STAYING_BYTES a document all the time, and MEMBER_BYTES for each that is sorted at once. If `memory_gib` is too
small for all at once, the keys are read in several rounds, a range of keys in each.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import publish, publish_json
from data_pipeline.prepare.dedup.documents import Documents, Other, Reader
from data_pipeline.prepare.dedup.groups import MEMBER_BYTES, Forest, Members, settle
from data_pipeline.prepare.dedup.keys import KeysFile
from data_pipeline.prepare.dedup.near import join_near
from data_pipeline.prepare.recipe_config import DedupConfig, MinHashConfig
from data_pipeline.text.hashing import U64, mix

NEAR = "nearly the same text"
KINDS = {"the same URL": 1, "the same text": 2, NEAR: 3}
LARGEST = 10  # groups that are named
LARGE = 100  # documents: a larger group of near-duplicates is warned of, since links may chain documents that differ
SHOWN = 5  # documents of a large group that are named
SUMMARY = "clusters.json"


@dataclass
class Groups:
    """Groups of one kind; a size counts this corpus alone, and is 1 if the rest is in another corpus."""

    groups: int = 0
    documents: int = 0  # in them
    sizes: dict[int, int] = field(default_factory=dict)  # groups of each size
    largest: list[dict[str, Any]] = field(default_factory=list)
    """{size, and part and row, or corpus, of what stays}; of one above LARGE also `members`, the first that go."""


@dataclass
class Report:
    documents: int
    stay: int = 0
    removed: dict[str, int] = field(default_factory=dict)  # by reason
    groups: dict[str, Groups] = field(default_factory=dict)  # by the reason within the corpus


def reasons(others: Sequence[str] = ()) -> list[str | None]:
    """The reason of each code, given the names of the other corpora in order; that of code 0, which stays, is None."""
    return [None, *(kind + corpus for corpus in ("", *(f" as in {name}" for name in others)) for kind in KINDS)]


def find(keys: Path, others: Sequence[Other], cfg: DedupConfig, out: Path) -> Report:
    """Decide over all parts in the folder `keys`, in the order of their names.

    Publishes for each part OUT/NAME.npy, a code for each row [rows] uint8 (see `reasons`), and then OUT/clusters.json.

    Raises:
        UserError: a file that is missing, damaged or made with other settings; more documents than `memory_gib` is for.
    """
    docs = Documents(keys, others, cfg)
    names = [other.name for other in others]
    report = Report(docs.total - docs.own)
    for kind, code in KINDS.items():
        groups = _decide(docs, code, cfg)
        if groups is not None:
            report.groups[kind] = groups
    counts = np.zeros(256, np.int64)
    out.mkdir(parents=True, exist_ok=True)
    for name, codes in docs.parts():
        counts += np.bincount(codes, minlength=256)
        data = io.BytesIO()
        np.lib.format.write_array(data, codes, version=(1, 0), allow_pickle=False)
        publish(out / f"{name}.npy", data.getvalue())
    report.stay = int(counts[0])
    report.removed = {why: int(n) for why, n in zip(reasons(names), counts, strict=False) if why and n}
    publish_json(out / SUMMARY, asdict(report))
    return report


def _decide(docs: Documents, code: int, cfg: DedupConfig) -> Groups | None:
    """Take out the duplicates of one kind; None if the recipe does not have that step."""
    if code == 1:
        return _settle(docs, code, lambda _, file: file.column("url")) if cfg.url else None
    if code == 2:
        match = cfg.text
        return _settle(docs, code, lambda _, file: file.column(match.value)) if match else None
    if cfg.minhash is None:
        return None
    forest = _linked(docs, cfg.minhash)
    joined = forest.joined()

    def group(start: int, file: KeysFile) -> U64:
        index = np.arange(start, start + file.rows)
        return np.where(joined[index], mix(forest.root(index).astype(np.uint64) + np.uint64(1)), np.uint64(0))

    return _settle(docs, code, group)


def _settle(docs: Documents, code: int, read: Reader) -> Groups:
    sizes: Counter[int] = Counter()
    largest: list[tuple[int, int]] = []  # -size, index
    for rows in docs.rounds(read):
        best = settle(docs.ranked(rows), docs.limit, partial(docs.lose, kind=code))
        best = best.take((best.size > 1) | ((best.index < docs.own) & (best.size > 0)))
        values, counts = np.unique(best.size, return_counts=True)
        sizes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        first = np.lexsort((best.index, -best.size))[:LARGEST]
        largest += zip((-best.size[first]).tolist(), best.index[first].tolist(), strict=True)
        largest = sorted(largest)[:LARGEST]
    documents = sum(size * count for size, count in sizes.items())
    named = [{"size": -size, **docs.locate(index)} for size, index in largest]
    large = [index for size, index in largest if -size > LARGE]
    for group, members in zip(named, _losers(docs, code, read, large), strict=False):
        group["members"] = [docs.locate(index) for index in members]
    return Groups(sizes.total(), documents, dict(sorted(sizes.items())), named)


def _losers(docs: Documents, code: int, read: Reader, winners: Sequence[int]) -> list[list[int]]:
    """The first SHOWN documents that lost by this code to each of the winners."""
    keys = [
        int(read(start, file)[i - start]) for i in winners for start, file in docs.files if 0 <= i - start < file.rows
    ]
    losers: list[list[int]] = [[] for _ in keys]
    for start, file in docs.files if keys else ():
        codes = docs.codes[start : start + file.rows]
        lost = np.where((codes > 0) & ((codes - code) % len(KINDS) == 0), read(start, file), np.uint64(0))
        for key, found in zip(keys, losers, strict=True):
            found += (start + np.flatnonzero(lost == key)[: SHOWN - len(found)]).tolist()
    return losers


def _linked(docs: Documents, minhash: MinHashConfig) -> Forest:
    """The documents that are nearly the same, joined."""
    forest = Forest(docs.total)
    for band in range(minhash.bands):

        def read(_: int, file: KeysFile, band: int = band) -> U64:
            return file.band(band)

        if minhash.min_jaccard is None:
            for rows in docs.rounds(read):
                plain = (Members.plain(keys, start + index) for start, _, index, keys in rows)
                settle(plain, docs.limit, forest.join)
        else:
            cost = 24 * (minhash.bands + 4)  # bytes that are read, and twice as many while they are sorted
            for rows in docs.rounds(read, cost):
                compared = (
                    (start + index, file.column("bands")[:, index], file.set_sizes()[index])
                    for start, file, index, _ in rows
                    if len(index)
                )
                join_near(compared, band, minhash, docs.limit * MEMBER_BYTES // cost, docs.sets, forest)
        forest.flatten()
    return forest

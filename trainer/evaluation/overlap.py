"""Overlap of the questions of tasks with training documents, as GPT-3's appendix C counts it.

A question with its right answer is dirty if one of its n-grams occurs in a document of the shards, else clean. Words
and n are as in `data_pipeline/text/grams.py`; a task that a program wrote (`synthetic`) may have n below 8.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from conf.errors import UserError
from data_pipeline.config import CacheConfig, FetchConfig, below
from data_pipeline.manifest import TOKENIZER, Manifest, index_name
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.mirror import NoSource
from data_pipeline.remote.source import index_at, open_source
from data_pipeline.stream.windows import read_shard
from data_pipeline.text.grams import MIN_N, EvaluationSet, Grams
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.distributed.world import World
from trainer.evaluation.evaluation import Plan
from trainer.evaluation.journal import Journal
from trainer.evaluation.kinds.kind import Outcome

BATCH = 64  # documents that are searched together
QUIET_S = 30.0  # between two lines of progress in a file


class _Shard(NamedTuple):
    manifest: Manifest
    number: int

    @property
    def tokens(self) -> int:
        return self.manifest.shards[self.number].tokens


@dataclass(frozen=True)
class Overlap:
    """Shards of one vocabulary, and the n-grams of tasks that are looked for in their documents."""

    manifests: Sequence[Manifest]
    tokenizer: Tokenizer
    grams: Grams

    @classmethod
    def plan(cls, against: Sequence[str], plans: Sequence[Plan]) -> Overlap:
        """The search, checked before any model is loaded; `against`: folders or URLs, each as a run's `data.path`.

        Raises:
            UserError: no shards there, some of them missing, or without a vocabulary that decodes them.
        """
        with _cache() as cache:
            manifests = [_opened(path, cache) for path in against]
            tokenizer = _tokenizer(manifests)
        sets = []
        for plan in plans:
            texts = [plan.kind.demonstration(q.document) for q in plan.questions]
            decoded = [tokenizer.decode(tokenizer.encode(text)) for text in texts]  # as documents: GPT-1's loses cases
            sets.append(EvaluationSet.of_texts(plan.name, decoded, 1 if plan.task.synthetic else MIN_N))
        return cls(manifests, tokenizer, Grams(sets))

    def search(self, world: World, folder: Path) -> dict[str, np.ndarray]:
        """The dirty questions of each task, [questions] bool. Each rank reads its part of the shards. Collective.

        The n-grams of each whole shard go to a journal in `folder`, so that the same search reads no shard twice.
        """
        from trainer.distributed.collective import all_ranks

        journal = Journal(folder, world.rank)
        shards = {self._key(shard): shard for shard in self._shards()}
        rows = all_ranks("against", lambda: journal.read(shards.keys()) if world.is_main else {})[0]
        found = np.zeros(self.grams.size, bool)
        for row in rows.values():
            found[row["grams"]] = True
        left = sorted(shards.keys() - rows.keys(), key=lambda key: (-shards[key].tokens, key))
        if world.is_main and rows and left:
            print(f"against: {len(rows)} of {len(shards)} shards are in the journal", file=sys.stderr, flush=True)
        own = [shards[key].tokens for key in left[world.rank :: world.world_size]]
        with self._progress(sum(own), hidden=not world.is_main) as bar:
            for first in range(0, len(left), world.world_size):  # together, so that no rank waits for long
                part = left[first + world.rank : first + world.world_size][:1]
                read = partial(self._found, {key: shards[key] for key in part}, journal, bar)
                for ids in all_ranks("against", read):
                    found[ids] = True
        journal.close()
        return {s.name: self.grams.dirty(s, found) for s in self.grams.sets}

    def divide(
        self,
        plans: Sequence[Plan],
        outcomes: Mapping[str, Outcome],
        dirty: Mapping[str, np.ndarray],
        measure: Callable[[Plan], Outcome],
    ) -> None:
        """Add to the outcome of each task the figures of its clean and of its dirty questions.

        A perplexity has the numbers of these alone: what is clean of a text that goes on is another text.
        """
        for plan, s in zip(plans, self.grams.sets, strict=True):
            outcome, marks = outcomes[plan.name], dirty[plan.name].tolist()
            for name, mark in (("clean", False), ("dirty", True)):
                questions = [q for q, one in zip(plan.questions, marks, strict=True) if one is mark]
                asked = questions and plan.task.perplexity is None
                figures = measure(replace(plan, questions=questions)).figures if asked else {}
                outcome.parts[name] = {"n": len(questions), "share": len(questions) / len(marks), **figures}
            outcome.notes |= {"ngram": s.n, "training_documents": self.documents}
            if short := int((s.lengths < s.n).sum()):
                outcome.notes["clean_as_shorter_than_ngram"] = short
            for sample, one in zip(outcome.samples, marks, strict=True):
                sample["dirty"] = one

    @property
    def documents(self) -> int:
        """The number of training documents."""
        return sum(manifest.documents for manifest in self.manifests)

    def _shards(self) -> Iterator[_Shard]:
        for manifest in self.manifests:
            for number in range(len(manifest.shards)):
                yield _Shard(manifest, number)

    def _key(self, shard: _Shard) -> str:
        """The hash of all that the n-grams found in a shard depend on."""
        of = (shard.manifest.shards[shard.number].sha256, self.tokenizer.sha256, self.grams.fingerprint)
        return hashlib.blake2b(" ".join(of).encode(), digest_size=12).hexdigest()

    def _progress(self, tokens: int, hidden: bool) -> tqdm[Any]:
        every = 0.5 if sys.stderr.isatty() else QUIET_S
        about: dict[str, Any] = {"desc": "against", "unit": "token", "unit_scale": True, "leave": False}
        return tqdm(total=tokens, mininterval=every, disable=hidden or not tokens, **about)

    def _found(self, shards: dict[str, _Shard], journal: Journal, bar: tqdm[Any]) -> list[int]:
        """Ids of the n-grams in some shards; those of each go to the journal once it is read to its end."""
        found: set[int] = set()
        for key, shard in shards.items():
            texts, ids = self._texts(shard, bar), set[int]()
            while some := list(islice(texts, BATCH)):
                ids.update(self.grams.hits(some, self.grams.tables).ids.tolist())
            journal.add({key: {"grams": sorted(ids)}})
            found |= ids
        return sorted(found)

    def _texts(self, shard: _Shard, bar: tqdm[Any]) -> Iterator[str]:
        """The documents of a shard. An end of text inside of one, as in files of others, ends a document too."""
        manifest, eot = shard.manifest, self.tokenizer.eot_id
        with _cache() as cache:
            tokens = read_shard(manifest, manifest.shards[shard.number], cache)
            ends = np.cumsum(index_at(manifest, shard.number, cache).document_tokens, dtype=np.int64)
        if eot is not None:
            ends = np.union1d(ends, np.flatnonzero(tokens == eot) + 1)
        for start, end in pairwise([0, *ends.tolist()]):
            ids = tokens[start:end].tolist()
            yield self.tokenizer.decode(ids[:-1] if ids and ids[-1] == eot else ids)
            bar.update(end - start)


@contextmanager
def _cache() -> Iterator[Cache]:
    """A folder for the blocks of one remote shard, removed when that is read."""
    with TemporaryDirectory(prefix="gradus-") as folder:
        yield Cache(CacheConfig(dir=folder), FetchConfig())


def _opened(path: str, cache: Cache) -> Manifest:
    """The training shards at a path: of a source, or of its train/."""
    if path.startswith("pipe:"):
        raise UserError(f"against={path}: runs a command: give a folder or a URL")
    for place in (path, below(path, "train")):
        try:
            manifest = open_source(place, cache)
        except NoSource:
            continue
        _check_files(path, manifest)
        return manifest
    raise UserError(f"against={path}: no manifest.json there or in its train/: give what `shards write` made")


def _check_files(path: str, manifest: Manifest) -> None:
    if not manifest.documents:
        raise UserError(f"against={path}: no document in its shards: give those of the training")
    names = [name for shard in manifest.shards for name in (shard.name, index_name(shard.name))]
    for name in names if manifest.origin is None else ():
        if not os.access(manifest.root / name, os.R_OK):
            raise UserError(
                f"against={path}: {manifest.root / name} cannot be read: put it back, or write the shards anew"
            )


def _tokenizer(manifests: Sequence[Manifest]) -> Tokenizer:
    """The vocabulary of all the shards, ready to decode."""
    one = manifests[0]
    for manifest in manifests:
        if manifest.tokenizer_sha256 != one.tokenizer_sha256:
            raise UserError(
                f"against: {one.root} and {manifest.root} have different tokenizers: search them one by one"
            )
    path = one.root / TOKENIZER
    if not path.is_file():
        raise UserError(f"against: no {path}, the vocabulary of the shards: put it back")
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != one.tokenizer_sha256:
        raise UserError(f"against: {path} is not the tokenizer that the shards were written with: put it back")
    tokenizer.decode([])  # raises for a vocabulary that its library cannot use
    return tokenizer

"""Records to examples in memory; a record that gives none is dropped and counted by its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from conf.errors import UserError
from data_pipeline.corpus.document import Dropped
from data_pipeline.examples.forms import Misfit
from data_pipeline.examples.records import Record
from data_pipeline.examples.templates import Example, Marked, Piece

MAX_TOKENS = 1 << 31  # of all examples, which are held in memory
_AT_ONCE = 64  # records in one call of the tokenizer

T = TypeVar("T")
R = TypeVar("R", bound=Marked)
Meanings = Callable[[Record], Iterator[tuple[Any, list[list[Piece]]]]]
Join = Callable[[list[Example], Any], tuple[T, int]]


@dataclass
class Tally:
    """The records that were read, and for each reason how many gave no example, with the place of the first."""

    records: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)

    def kept(self, items: Iterable[Record | Dropped]) -> Iterator[Record]:
        """Count what a reader gives, and pass on its records."""
        for item in items:
            self.records += 1
            if isinstance(item, Dropped):
                self.drop(item.reason, item.path)
            else:
                yield item

    def drop(self, reason: str, path: str) -> None:
        count, first = self.dropped.get(reason, (0, path))
        self.dropped[reason] = count + 1, first

    def __str__(self) -> str:
        by_count = sorted(self.dropped.items(), key=lambda item: -item[1][0])
        return "; ".join(f"{count:,} dropped: {reason} (first: {path})" for reason, (count, path) in by_count)


@dataclass
class Examples(Generic[T, R]):
    """Everything that the files of a config give, in their order.

    paths: the record of each item. tokens: of all items. labels: those of them that are learnt.
    """

    items: list[T]
    paths: list[str]
    renderer: R
    about: str  # the form and the template, in words
    tally: Tally = field(default_factory=Tally)
    tokens: int = 0
    labels: int = 0
    longest: int = 0
    unknown: int = 0  # tokens that stand for text which the vocabulary cannot write

    def summary(self) -> list[str]:
        """Lines on the examples for the start of a run."""
        lines = [
            f"examples: {len(self.items):,} of {self.tally.records:,} records ({self.about}): {self.tokens:,} tokens, "
            f"{self.labels:,} of them labels; the longest has {self.longest:,}"
        ]
        lines += [f"examples: {self.tally}"] if self.tally.dropped else []
        lines += [f"examples: {self.unknown:,} tokens are unknown to the vocabulary"] if self.unknown else []
        return lines


def collect(
    found: Examples[T, R], source: Iterator[Record], limit: int, meanings: Meanings, join: Join[T], path: str
) -> Examples[T, R]:
    """`found`, with the items of all records in it.

    Args:
        limit: ids of the longest sequence that is kept.
        meanings: (meaning, sequences) of each item of a record; raises Misfit.
        join: the item of its encoded sequences and its meaning, and the ids of its longest sequence.
        path: of the files, for messages.

    Raises:
        UserError: more tokens than memory is for, or no item.
    """
    while some := list(islice(source, _AT_ONCE)):
        rendered = [(record.path, *item) for record in some for item in _items(found.tally, record, meanings)]
        _add(found, rendered, limit, join)
        if found.tokens > MAX_TOKENS:
            raise UserError(
                f"path={path}: more than {MAX_TOKENS:,} tokens of examples, which are held in memory: give fewer, or "
                "make shards of them and pre-train"
            )
    if not found.items:
        raise UserError(f"path={path}: no example in {found.tally.records:,} records ({found.about}): {found.tally}")
    return found


def _items(tally: Tally, record: Record, meanings: Meanings) -> Iterator[tuple[Any, list[list[Piece]]]]:
    try:
        yield from meanings(record)
    except Misfit as e:
        tally.drop(str(e), record.path)


def _add(found: Examples[T, R], rendered: list[tuple[str, Any, list[list[Piece]]]], limit: int, join: Join[T]) -> None:
    encoded = iter(found.renderer.encode([pieces for *_, sequences in rendered for pieces in sequences]))
    unknown = found.renderer.tokenizer.unk_id
    for path, meant, sequences in rendered:
        parts = list(islice(encoded, len(sequences)))
        item, longest = join(parts, meant)
        if longest > limit:
            found.tally.drop(f"longer than {limit:,} tokens", path)
            continue
        found.items.append(item)
        found.paths.append(path)
        found.tokens += sum(len(part.ids) for part in parts)
        found.labels += sum(int(part.mask.sum()) for part in parts)
        found.longest = max(found.longest, longest)
        if unknown is not None:
            found.unknown += sum(int((part.ids == unknown).sum()) for part in parts)

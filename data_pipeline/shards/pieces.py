"""Pieces of documents as token ids, and how they become whole documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus.report import Dropped

MAX_TOKENS = 1 << 26  # of a document


TOO_LONG = f"a document of more than {MAX_TOKENS:,} tokens"


@dataclass(frozen=True, slots=True)
class Piece:
    """Token ids [n] as a file has them: a document, or (nanogpt) some of a stream from token `start` on.

    `path` says where it lies, as file or file:number; `size` is its bytes on the disk, for the progress bar.
    """

    id: str
    path: str
    ids: np.ndarray
    size: int
    start: int = 0


class _Held:
    """The document that a stream is in the middle of; one that grows too long is counted, not held."""

    def __init__(self, name: str) -> None:
        self.name, self.number = name, 0
        self.parts: list[np.ndarray] = []
        self.length = self.size = 0

    def take(self, ids: np.ndarray) -> None:
        self.length += len(ids)
        if self.length <= MAX_TOKENS:
            self.parts.append(ids)
        else:
            self.parts.clear()

    def give(self) -> Piece | Dropped:
        where = f"{self.name}:{self.number}"
        found: Piece | Dropped = Dropped(TOO_LONG, where)
        if self.length <= MAX_TOKENS:
            found = Piece(where, where, np.concatenate(self.parts), self.size)
        self.parts, self.length, self.size, self.number = [], 0, 0, self.number + 1
        return found


def cut(name: str, stream: Iterator[Piece | Dropped], eot_id: int | None) -> Iterator[Piece | Dropped]:
    """A stream's documents, `name`:0 and on, each with the end-of-text that ends it; the last one may have none."""
    held = _Held(name)
    for piece in stream:
        if isinstance(piece, Dropped):  # what follows does not go on where it stopped
            if held.length:
                yield held.give()
            yield piece
            continue
        ids, at = piece.ids, 0
        held.size += piece.size
        ends = [] if eot_id is None else (np.flatnonzero(ids == eot_id) + 1).tolist()
        for end in ends:
            held.take(ids[at:end])
            yield held.give()
            at = end
        held.take(ids[at:])
    if held.length:
        yield held.give()


def checked(piece: Piece | Dropped, vocab_size: int, dtype: str) -> Piece | Dropped:
    """The same in the dtype of the shards.

    Raises:
        UserError: an id that is not in the vocabulary.
    """
    if isinstance(piece, Dropped):
        return piece
    if len(piece.ids) and (piece.ids.min() < 0 or piece.ids.max() >= vocab_size):
        at = int(np.flatnonzero((piece.ids < 0) | (piece.ids >= vocab_size))[0])
        raise UserError(
            f"{piece.path}: token {piece.start + at} is {piece.ids[at]}, in a vocabulary of {vocab_size} ids: give the "
            f"tokenizer= that the ids were made with, and dtype= where the file does not say it"
        )
    return replace(piece, ids=piece.ids.astype(dtype))

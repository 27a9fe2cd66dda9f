"""Pieces of documents as token ids, and their assembly into whole documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus.document import Dropped

MAX_TOKENS = 1 << 26  # of a document
TOO_LONG = f"a document of more than {MAX_TOKENS:,} tokens"


@dataclass(frozen=True, slots=True)
class Piece:
    """Token ids [n] as a file has them: a document, or (nanogpt) a stretch of a stream from token `start` on.

    `path` is file or file:number; `size` is its number of bytes on the disk, for the progress bar.
    """

    id: str
    path: str
    ids: np.ndarray
    size: int
    start: int = 0


class _Held:
    """The unfinished document of a stream; one that grows too long is counted, not held."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.parts: list[np.ndarray] = []
        self.length = self.size = 0

    def take(self, ids: np.ndarray) -> None:
        self.length += len(ids)
        if self.length <= MAX_TOKENS:
            self.parts.append(ids)
        else:
            self.parts.clear()

    def give(self) -> Piece | Dropped:
        path = f"{self.name}:{self.number}"
        document: Piece | Dropped = Dropped(TOO_LONG, path)
        if self.length <= MAX_TOKENS:
            document = Piece(path, path, np.concatenate(self.parts), self.size)
        self.parts.clear()
        self.length = self.size = 0
        self.number += 1
        return document


def cut(name: str, stream: Iterator[Piece | Dropped], eot_id: int | None) -> Iterator[Piece | Dropped]:
    """A stream's documents, `name`:0 and on, each up to its end-of-text; the last one may have none."""
    held = _Held(name)
    for piece in stream:
        if isinstance(piece, Dropped):  # the next piece does not continue the document
            if held.length:
                yield held.give()
            yield piece
            continue
        ids, start = piece.ids, 0
        held.size += piece.size
        ends = [] if eot_id is None else (np.flatnonzero(ids == eot_id) + 1).tolist()
        for end in ends:
            held.take(ids[start:end])
            yield held.give()
            start = end
        held.take(ids[start:])
    if held.length:
        yield held.give()


def checked(piece: Piece | Dropped, vocab_size: int, dtype: str) -> Piece | Dropped:
    """The piece in the dtype of the shards.

    Raises:
        UserError: an id that is not in the vocabulary.
    """
    if isinstance(piece, Dropped):
        return piece
    if len(piece.ids) and (piece.ids.min() < 0 or piece.ids.max() >= vocab_size):
        i = int(np.flatnonzero((piece.ids < 0) | (piece.ids >= vocab_size))[0])
        raise UserError(
            f"{piece.path}: token {piece.start + i} is {piece.ids[i]}, in a vocabulary of {vocab_size} ids: give the "
            f"tokenizer= that the ids were made with, and dtype= where the file does not say it"
        )
    return replace(piece, ids=piece.ids.astype(dtype))

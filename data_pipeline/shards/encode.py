"""Documents -> token ids, in several processes. The result does not depend on their number.

The main process cuts the input in tasks of about a megabyte; a worker parses, splits and encodes one; results come
back in the order of the tasks.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from data_pipeline.corpus.corpus_config import CorpusConfig
from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.read import Record, parse
from data_pipeline.corpus.workers import follow_parent, worker_pool
from data_pipeline.shards.output import Position
from data_pipeline.tokenizer.tokenizer import Tokenizer

TASK = 1 << 20  # bytes of input a task has at least


@dataclass(frozen=True, slots=True)
class Encoding:
    """The settings of a worker. Documents before `finished[split]` are already in published shards."""

    corpus: CorpusConfig
    tokenizer: bytes
    dtype: str
    val_fraction: float
    finished: dict[str, Position]


@dataclass(frozen=True, slots=True)
class Task:
    number: int
    records: list[Record | Dropped]
    size: int  # bytes on disk, for the progress bar


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document's tokens [n], end-of-text included; None if a finished shard holds it."""

    split: str
    position: Position
    origin: dict[str, str]  # id, source, path and, if known, url
    ids: np.ndarray | None
    unknown: int = 0  # characters that the vocabulary (GPT-1's) cannot spell


Work = Iterator[tuple[Task, list[Encoded | Dropped]]]


def split_of(text: str, val_fraction: float) -> str:
    """train or val, by the hash of the text alone: independent of order, workers and other documents."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return "val" if draw < val_fraction * 2**64 else "train"


def tasks(records: Iterable[Record | Dropped]) -> Iterator[Task]:
    number = held = size = 0
    pieces: list[Record | Dropped] = []
    for record in records:
        pieces.append(record)
        if isinstance(record, Record):
            size += record.size
            held += record.file.size if record.lines is None else len(record.lines)
        if held >= TASK:
            yield Task(number, pieces, size)
            number, pieces, held, size = number + 1, [], 0, 0
    if pieces:
        yield Task(number, pieces, size)


class Encoder:
    """Encodes the documents of a task; one per process."""

    def __init__(self, cfg: Encoding) -> None:
        self.cfg = cfg
        self.tokenizer = Tokenizer(cfg.tokenizer)

    def __call__(self, task: Task) -> list[Encoded | Dropped]:
        items = [item for record in task.records for item in parse(record, self.cfg.corpus)]
        out: list[Encoded | Dropped] = []
        wanted: list[tuple[int, str]] = []  # index in `out` and text of the documents to encode
        for i, item in enumerate(items):
            if isinstance(item, Dropped):
                out.append(item)
                continue
            split, position = split_of(item.text, self.cfg.val_fraction), (task.number, i)
            if position >= self.cfg.finished[split]:
                wanted.append((i, item.text))
            out.append(Encoded(split, position, _origin(item), None))
        for i, ids, unknown in self._encode(wanted):
            document = out[i]
            assert isinstance(document, Encoded)
            out[i] = Encoded(document.split, document.position, document.origin, ids, unknown)
        return out

    def _encode(self, wanted: list[tuple[int, str]]) -> Iterator[tuple[int, np.ndarray, int]]:
        """(index, ids with their end-of-text, unknown characters) of each text."""
        if not wanted:
            return
        tokenizer = self.tokenizer
        end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        for (i, _), ids in zip(wanted, tokenizer.encode_batch([text for _, text in wanted]), strict=True):
            unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(ids == tokenizer.unk_id))
            yield i, np.concatenate([ids, np.array(end, ids.dtype)]).astype(self.cfg.dtype), unknown


def _origin(doc: Document) -> dict[str, str]:
    origin = {"id": doc.id, "source": doc.metadata["source"], "path": doc.metadata["path"]}
    return origin | ({"url": doc.metadata["url"]} if "url" in doc.metadata else {})


def encode_all(cfg: Encoding, work: Iterable[Task], workers: int) -> Work:
    """Results in the order of `work`; at most two tasks per worker are in flight.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 1:
        encoder = Encoder(cfg)
        yield from ((task, encoder(task)) for task in work)
        return
    waiting: deque[tuple[Task, Future[list[Encoded | Dropped]]]] = deque()
    # "spawn": fork would copy the libraries' threads in an unknown state
    with worker_pool(workers, "spawn", _start, (cfg,), "workers", "shards") as pool:
        for task in work:
            waiting.append((task, pool.submit(encode_task, task)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


_encoder: Encoder | None = None  # of this worker process


def _start(cfg: Encoding) -> None:
    global _encoder
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers
    follow_parent()
    _encoder = Encoder(cfg)


def encode_task(task: Task) -> list[Encoded | Dropped]:
    assert _encoder is not None
    return _encoder(task)

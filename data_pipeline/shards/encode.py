"""Documents -> token ids, on several processes. What comes out does not depend on how many there are.

The main process cuts the input in tasks of about a megabyte; a worker parses, splits and encodes one; results come
back in the order of the tasks.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus.child_process import follow_parent
from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.corpus.inputs import Document
from data_pipeline.corpus.read import Record, parse
from data_pipeline.corpus.report import Dropped
from data_pipeline.tokenizer.tokenizer import Tokenizer

TASK = 1 << 20  # bytes of input a task has at least
Place = tuple[int, int]  # (task, item of that task): where in the corpus a document stands


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to know. Documents before `finished[split]` are in published shards already."""

    corpus: CorpusConfig
    tokenizer: bytes
    dtype: str
    val_fraction: float
    finished: dict[str, Place]


@dataclass(frozen=True, slots=True)
class Task:
    number: int
    records: list[Record | Dropped]
    size: int  # bytes on disk, for the progress bar


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document's tokens [n], end-of-text included; None where a finished shard holds it."""

    split: str
    place: Place
    origin: dict[str, str]  # id, source, path and where known url
    ids: np.ndarray | None
    unknown: int = 0  # characters that the vocabulary (GPT-1's) cannot spell


def split_of(text: str, val_fraction: float) -> str:
    """train or val by the text's own hash: no order, no worker and no other document has a say."""
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
    """A task's documents, encoded; one per process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = Tokenizer(job.tokenizer)

    def __call__(self, task: Task) -> list[Encoded | Dropped]:
        job, tokenizer = self.job, self.tokenizer
        items = [item for record in task.records for item in parse(record, job.corpus)]
        splits = [split_of(x.text, job.val_fraction) if isinstance(x, Document) else "" for x in items]
        new = [s != "" and (task.number, i) >= job.finished[s] for i, s in enumerate(splits)]
        texts = [x.text for x, wanted in zip(items, new, strict=True) if wanted and isinstance(x, Document)]
        encoded = iter(tokenizer.encode_batch(texts)) if texts else iter(())
        out: list[Encoded | Dropped] = []
        for i, item in enumerate(items):
            if isinstance(item, Dropped):
                out.append(item)
                continue
            origin = {"id": item.id, "source": item.source, "path": item.path}
            if item.url:
                origin["url"] = item.url
            if not new[i]:
                out.append(Encoded(splits[i], (task.number, i), origin, None))
                continue
            ids = next(encoded)
            unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(ids == tokenizer.unk_id))
            end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
            ids = np.concatenate([ids, np.array(end, ids.dtype)]).astype(job.dtype)
            out.append(Encoded(splits[i], (task.number, i), origin, ids, unknown))
        return out


def encode_all(job: Job, work: Iterable[Task], workers: int) -> Iterator[tuple[Task, list[Encoded | Dropped]]]:
    """Results in the order of `work`, at most two tasks a worker under way.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 1:
        encoder = Encoder(job)
        yield from ((task, encoder(task)) for task in work)
        return
    waiting: deque[tuple[Task, Future[list[Encoded | Dropped]]]] = deque()
    context = multiprocessing.get_context("spawn")  # fork would copy the libraries' threads in an unknown state
    pool = ProcessPoolExecutor(workers, context, _start, (job,))
    try:
        for task in work:
            waiting.append((task, pool.submit(_run, task)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, perhaps for want of memory: run the same command again with fewer than "
            f"workers={workers}; finished shards are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None  # of this worker process


def _start(job: Job) -> None:
    global _encoder
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers
    follow_parent()
    _encoder = Encoder(job)


def _run(task: Task) -> list[Encoded | Dropped]:
    assert _encoder is not None
    return _encoder(task)

"""A stage of a recipe: files -> documents, in tasks, and each task in parts that are published one by one.

A task is some of the input files; whichever process of whichever executor takes it, it does the same. A part is a
stretch of a task that the input alone cuts. Its documents are published first, then what goes with them, last its mark:
where it ends, and what went through each step. A killed task goes on behind its last mark. One part's documents are
held in memory, and no more.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.corpus.child_process import follow_parent
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.report import Dropped
from data_pipeline.files import publish, publish_json, read_json
from data_pipeline.prepare.step import Passage, Step
from data_pipeline.tokenizer.tokenizer import Tokenizer

Read = Callable[[Input, int], Iterator[tuple[Document | Dropped, int]]]
"""The records of a file from a position on (0 = its start), each with the position behind it."""

LEAST = 1 << 10  # bytes that a record counts at least, in the size of a part


@dataclass
class Mark:
    """The end of a part: `position` in file number `file` of its task."""

    file: int = 0
    position: int = 0
    last: bool = False
    documents: int = 0
    bytes: int = 0  # of the input's files, from the task's start to this end
    passages: dict[str, Passage] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        publish_json(path, vars(self) | {"passages": {name: p.to_json() for name, p in self.passages.items()}})

    @classmethod
    def load(cls, path: Path) -> Mark:
        body = read_json(path, "delete the output and begin anew")
        return cls(**body | {"passages": {name: Passage.from_json(p) for name, p in body["passages"].items()}})


@dataclass(frozen=True)
class TokenCount:
    """How many tokens texts have; the vocabulary is loaded once in each process that counts."""

    tokenizer: str

    def __call__(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in vocabulary(self.tokenizer).encode_batch(list(texts))] if texts else []


@cache
def vocabulary(tokenizer: str) -> Tokenizer:
    return Tokenizer.load(tokenizer)


class Parts(PipelineStep):
    """datatrove's step that does a whole stage: task `rank` reads its files, and its documents go through `steps`.

    Args:
        files: those of a task, by its number; asked for when the task begins
        read: makes records of a file
        documents: folder of the parts' TTTTT-PPPPP.jsonl.zst; a part without documents has none
        marks: folder of the parts' marks
        part_bytes: of pages or text, after which a part ends
        beside: writes what goes with a part's documents; gets the part's name and them
    """

    type = "stage"

    name = "parts"

    def __init__(
        self,
        files: Callable[[int], list[Input]],
        read: Read,
        steps: Sequence[Step],
        documents: Path,
        marks: Path,
        part_bytes: float,
        tokens: TokenCount | None = None,
        beside: Callable[[str, Sequence[Document]], None] | None = None,
    ) -> None:
        super().__init__()
        self.files, self.read, self.steps, self.beside = files, read, steps, beside
        self.documents, self.marks, self.part_bytes, self.tokens = documents, marks, part_bytes, tokens
        for step in steps:
            step.tokens = tokens

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        with alone(rank, self.marks, self.documents):
            files, done = self.files(rank), marks_of(self.marks, rank)
            mark = Mark.load(done[-1]) if done else Mark(last=not files)
            number = len(done)
            while not mark.last:
                mark = self._part(f"{rank:05d}-{number:05d}", files, mark)
                number += 1

    def _part(self, name: str, files: list[Input], begun: Mark) -> Mark:
        mark = Mark(begun.file, begun.position)
        for step in self.steps:
            step.passage = Passage()
        reading = Reading(self.read, files, mark, self.part_bytes, self.tokens)
        stream: Iterator[Document] = iter(reading)
        for step in self.steps:
            stream = step.run(stream)
        found = list(stream)
        if found:
            publish(self.documents / f"{name}.jsonl.zst", packed(found))
        if self.beside is not None:
            self.beside(name, found)
        mark.documents = len(found)
        mark.bytes = sum(f.size for f in files[: mark.file])
        if not mark.last:
            mark.bytes += max(0, min(mark.position, files[mark.file].size))
        mark.passages = {"read": reading.passage} | {step.name: step.passage for step in self.steps}
        mark.save(self.marks / f"{name}.json")
        return mark


class Reading:
    """The documents of one part; moves `mark` to its end."""

    def __init__(
        self, read: Read, files: list[Input], mark: Mark, part_bytes: float, tokens: TokenCount | None
    ) -> None:
        self.read, self.files, self.mark, self.part_bytes, self.tokens = read, files, mark, part_bytes, tokens
        self.passage = Passage()

    def __iter__(self) -> Iterator[Document]:
        mark, held = self.mark, 0
        while mark.file < len(self.files):
            for item, position in self.read(self.files[mark.file], mark.position):
                mark.position = position
                before = self.passage.taken.bytes
                if isinstance(item, Dropped):
                    self._drop(item)
                else:
                    yield self._give(item)
                held += max(LEAST, self.passage.taken.bytes - before)
                if held >= self.part_bytes:
                    return
            mark.file, mark.position = mark.file + 1, 0
        mark.last = True

    def _give(self, doc: Document) -> Document:
        if self.tokens is not None and not {"html", "tokens"} & doc.metadata.keys():  # an earlier stage counted
            (doc.metadata["tokens"],) = self.tokens([doc.text])
        self.passage.taken.count(doc)
        self.passage.given.count(doc)
        return doc

    def _drop(self, item: Dropped) -> None:
        doc = Document("", item.where)
        self.passage.taken.count(doc)
        self.passage.drop(item.reason, doc)


def packed(docs: Sequence[Document]) -> bytes:
    """JSON lines, as one zstd frame."""
    import orjson
    import zstandard

    lines = [orjson.dumps({"id": d.id, "text": d.text} | d.metadata, option=orjson.OPT_APPEND_NEWLINE) for d in docs]
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(b"".join(lines))


def marks_of(folder: Path, task: int) -> list[Path]:
    """Of the parts of a task that are published, in order."""
    return sorted(folder.glob(f"{task:05d}-*.json"))


@contextmanager
def alone(task: int, marks: Path, *others: Path) -> Iterator[None]:
    """Waits for another process at the same task, such as one that a killed start left behind; its rest is cleared."""
    for folder in (marks, *others):
        folder.mkdir(parents=True, exist_ok=True)
    with (marks / f".{task:05d}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in (left for folder in (marks, *others) for left in folder.glob(f".{task:05d}-*.tmp")):
            left.unlink()
        yield

"""A stage of a recipe: files -> documents, in tasks, and each task in parts that are published one by one.

A task is some of the input files; it does the same work in whichever process of whichever executor it runs. A part is a
stretch of a task that depends on the input alone. Its documents are published first, then the files that belong to
them, last its mark: the position of its end and the counts of each step. A killed task continues after its last mark.
The documents of one part are held in memory, and no more.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.report import Report
from data_pipeline.corpus.workers import follow_parent
from data_pipeline.files import from_json, publish, publish_json, read_json, remove_unfinished
from data_pipeline.prepare.step import CountTokens, Step
from data_pipeline.tokenizer.tokenizer import Tokenizer

Read = Callable[[Input, int], Iterator[tuple[Document | Dropped, int]]]
"""The records of a file from a position on (0 = its start), each with the position behind it."""

MIN_RECORD = 1 << 10  # bytes that a record counts at least, in the size of a part


@dataclass
class Mark:
    """The restart marker of a part: its end, `position` in file number `file` of its task, and its counts."""

    file: int = 0
    position: int = 0
    last: bool = False
    documents: int = 0
    bytes: int = 0  # of the input's files, from the task's start to this end
    passages: dict[str, Report] = field(default_factory=dict)  # of each step, by its name

    def save(self, path: Path) -> None:
        publish_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Mark:
        cure = "delete the output and begin again"
        return from_json(cls, read_json(path, cure), path, cure)


@dataclass(frozen=True)
class TokenCount:
    """The number of tokens of each text; the vocabulary is loaded once in each process that counts."""

    tokenizer: str

    def __call__(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in vocabulary(self.tokenizer).encode_batch(list(texts))] if texts else []


@cache
def vocabulary(tokenizer: str) -> Tokenizer:
    return Tokenizer.load(tokenizer)


class Parts(PipelineStep):
    """datatrove's step that does a whole stage: task `rank` reads its files, and its documents go through `steps`.

    Args:
        files: gives the files of a task, by its number, when the task starts
        read: makes records of a file
        documents: folder of the parts' TTTTT-PPPPP.jsonl.zst; a part without documents has none
        marks: folder of the parts' marks
        part_bytes: of pages or text, after which a part ends
        on_part: writes the files that belong to a part; gets the part's name and documents
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
        tokens: CountTokens | None = None,
        on_part: Callable[[str, Sequence[Document]], None] | None = None,
    ) -> None:
        super().__init__()
        self.files = files
        self.read = read
        self.steps = steps
        self.documents = documents
        self.marks = marks
        self.part_bytes = part_bytes
        self.tokens = tokens
        self.on_part = on_part
        for step in steps:
            step.tokens = tokens

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        with exclusive(rank, self.marks, self.documents):
            files, marks = self.files(rank), marks_of(self.marks, rank)
            mark = Mark.load(marks[-1]) if marks else Mark(last=not files)
            number = len(marks)
            while not mark.last:
                mark = self._part(f"{rank:05d}-{number:05d}", files, mark)
                number += 1

    def _part(self, name: str, files: list[Input], previous: Mark) -> Mark:
        mark = Mark(previous.file, previous.position)
        reader = PartReader(self.read, files, mark, self.part_bytes, self.tokens)
        stream: Iterator[Document] = iter(reader)
        for step in self.steps:
            step.report = Report()
            stream = step.run(stream)
        docs = list(stream)
        if docs:
            publish(self.documents / f"{name}.jsonl.zst", to_jsonl_zst(docs))
        if self.on_part is not None:
            self.on_part(name, docs)
        mark.documents = len(docs)
        mark.bytes = sum(f.size for f in files[: mark.file])
        if not mark.last:
            mark.bytes += max(0, min(mark.position, files[mark.file].size))
        mark.passages = {"read": reader.report} | {step.name: step.report for step in self.steps}
        mark.save(self.marks / f"{name}.json")
        return mark


@dataclass
class PartReader:
    """The documents of one part; moves `mark` to the part's end."""

    read: Read
    files: list[Input]
    mark: Mark
    part_bytes: float
    tokens: CountTokens | None
    report: Report = field(default_factory=Report)

    def __iter__(self) -> Iterator[Document]:
        mark, held = self.mark, 0
        while mark.file < len(self.files):
            for item, position in self.read(self.files[mark.file], mark.position):
                mark.position = position
                before = self.report.taken.bytes
                if isinstance(item, Document):
                    self._count_tokens(item)
                yield from self.report.kept([item])
                held += max(MIN_RECORD, self.report.taken.bytes - before)
                if held >= self.part_bytes:
                    return
            mark.file += 1
            mark.position = 0
        mark.last = True

    def _count_tokens(self, doc: Document) -> None:
        """Count those of a text, unless an earlier stage counted them."""
        if self.tokens is not None and not {"html", "tokens"} & doc.metadata.keys():
            (doc.metadata["tokens"],) = self.tokens([doc.text])


def to_jsonl_zst(docs: Sequence[Document]) -> bytes:
    """JSON lines, as one zstd frame."""
    import orjson
    import zstandard

    lines = [orjson.dumps({"id": d.id, "text": d.text} | d.metadata, option=orjson.OPT_APPEND_NEWLINE) for d in docs]
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(b"".join(lines))


def marks_of(folder: Path, task: int) -> list[Path]:
    """The marks of a task's published parts, in order."""
    return sorted(folder.glob(f"{task:05d}-*.json"))


@contextmanager
def exclusive(task: int, marks: Path, *others: Path) -> Iterator[None]:
    """Hold a task: wait for another process at it, such as one of a killed run, and remove its unfinished files."""
    for folder in (marks, *others):
        folder.mkdir(parents=True, exist_ok=True)
    with (marks / f".{task:05d}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in (marks, *others):
            remove_unfinished(folder, rf"{task:05d}-\d+\..+")
        yield

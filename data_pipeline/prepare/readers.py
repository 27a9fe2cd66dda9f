"""The readers of `Parts`, one for each format, and the input files of each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from conf.errors import UserError
from data_pipeline.corpus.corpus_config import CorpusFormat
from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.read import items_from
from data_pipeline.corpus.remote_inputs import fetched
from data_pipeline.prepare.parts import Read
from data_pipeline.prepare.prepare_config import RawConfig
from data_pipeline.prepare.warc import archive


def tasks_of(files: Sequence[Input], task_bytes: float) -> list[list[Input]]:
    """Files in their order, each task at least `task_bytes`; a file of unknown size is a task by itself."""
    tasks: list[list[Input]] = []
    held = task_bytes
    for file in files:
        if held >= task_bytes:
            tasks.append([])
            held = 0
        tasks[-1].append(file)
        held += file.size or (task_bytes if file.url else 0)
    return tasks


def reader_of(corpus: RawConfig, copies: Path) -> Read:
    """The reader of a corpus; files on other machines are first copied to the folder `copies`."""
    return partial(_read_corpus, corpus, copies)


def _read_corpus(corpus: RawConfig, copies: Path, file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
    """Records of a file; a position is an offset in an archive, else a number of records or of a table's rows."""
    file = fetched(file, copies)
    if corpus.format in (CorpusFormat.warc, CorpusFormat.links):
        return archive.read(file, corpus.recipe.limits, corpus.name, start)
    return read_text(corpus, file, start)


def read_text(corpus: RawConfig, file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
    """Records of text, JSON lines, tables and books."""
    limit = corpus.recipe.limits.page_mib * (1 << 20)
    for item, end in items_from(corpus, file, start):
        if isinstance(item, Document) and len(item.text) > limit:
            item = Dropped("it is larger than limits.page_mib", item.metadata["path"])
        yield item, end


@dataclass(frozen=True)
class PublishedFiles:
    """The files that a task of an earlier stage published."""

    folder: Path
    names: str = "{task:05d}-*.jsonl.zst"

    def __call__(self, task: int) -> list[Input]:
        paths = sorted(self.folder.glob(self.names.format(task=task)))
        return [Input(path, path.name, path.stat().st_size, 0) for path in paths]


def read_published(codes: Path | None, file: Input, start: int) -> Iterator[tuple[Document, int]]:
    """Documents that `Parts` wrote; each one's metadata["duplicate"] is its number in the folder `codes`."""
    import orjson

    duplicates = np.load(codes / f"{file.name.removesuffix('.jsonl.zst')}.npy") if codes else None
    for n, line in enumerate(_lines(file.path)[start:], start):
        body = orjson.loads(line)
        doc = Document(body.pop("text"), body.pop("id"), body)
        if duplicates is not None:
            doc.metadata["duplicate"] = int(duplicates[n])
        yield doc, n + 1


def _lines(path: Path) -> list[bytes]:
    """The lines of a whole file; raises UserError if it is damaged."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        text = frame.decompress(path.read_bytes())
    except zstandard.ZstdError as e:
        raise UserError(f"{path}: damaged ({e}): delete the output and run the same command again") from None
    if not frame.eof:
        raise UserError(f"{path}: cut off: delete the output and run the same command again")
    return text.splitlines()

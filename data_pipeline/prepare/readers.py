"""What Parts reads: the readers of each format, and which files make a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import Document

from conf.errors import UserError
from data_pipeline.corpus import inputs, parquet, read
from data_pipeline.corpus.config import CorpusFormat
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.remote_inputs import fetched
from data_pipeline.corpus.report import Dropped
from data_pipeline.prepare.config import RawConfig
from data_pipeline.prepare.parts import Read
from data_pipeline.prepare.recipe_config import LimitsConfig
from data_pipeline.prepare.warc import archive


def tasks_of(found: Sequence[Input], least: float) -> list[list[Input]]:
    """Files in their order, as many together as make `least` bytes; one whose size is not known is a task by itself."""
    tasks: list[list[Input]] = []
    held = least
    for file in found:
        if held >= least:
            tasks.append([])
            held = 0
        tasks[-1].append(file)
        held += file.size or (least if file.url else 0)
    return tasks


def reader_of(corpus: RawConfig, copies: Path) -> Read:
    """`copies`: the folder of those files that are fetched first."""
    archives = corpus.format in (CorpusFormat.warc, CorpusFormat.links)
    return ReadHere(ReadArchive(corpus.recipe.limits, corpus.name) if archives else ReadText(corpus), copies)


@dataclass(frozen=True)
class ReadHere:
    """parts.Read of a file that may lie elsewhere."""

    read: Read
    copies: Path

    def __call__(self, file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
        return self.read(fetched(file, self.copies), start)


@dataclass(frozen=True)
class ReadArchive:
    """parts.Read of WARC, ARC and WET; a position is an offset in the file."""

    limits: LimitsConfig
    source: str

    def __call__(self, file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
        return archive.read(file, self.limits, self.source, start)


@dataclass(frozen=True)
class ReadText:
    """parts.Read of text, JSON lines, tables and books; a position is a number of records, of tables one of rows."""

    corpus: RawConfig

    def __call__(self, file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
        most = self.corpus.recipe.limits.page_mib * (1 << 20)
        for item, end in self._items(file, start):
            if isinstance(item, inputs.Document) and len(item.text) > most:
                yield Dropped("it is larger than limits.page_mib", item.path), end
            else:
                yield (_on_its_way(item) if isinstance(item, inputs.Document) else item), end

    def _items(self, file: Input, start: int) -> Iterator[tuple[inputs.Document | Dropped, int]]:
        corpus, n = self.corpus, 0
        if corpus.format is CorpusFormat.parquet:
            yield from parquet.read(file, corpus.name, corpus.text_key, corpus.id_key, read.MAX_LINE, start)
            return
        for record in read.records(corpus, [file]):
            lines = getattr(record, "lines", None)
            if lines is not None and n + lines.count(b"\n") + 1 <= start:
                n += lines.count(b"\n") + 1  # each line is an item, which need not be parsed to be passed
                continue
            for item in read.parse(record, corpus):
                n += 1
                if n > start:
                    yield item, n


def _on_its_way(item: inputs.Document) -> Document:
    known = {"url": item.url, "date": item.date}
    metadata = {key: value for key, value in known.items() if value} | {"source": item.source, "path": item.path}
    return Document(item.text, item.id, metadata=metadata)


@dataclass(frozen=True)
class OfTask:
    """What a task of an earlier stage published."""

    folder: Path
    names: str = "{task:05d}-*.jsonl.zst"

    def __call__(self, task: int) -> list[Input]:
        found = sorted(self.folder.glob(self.names.format(task=task)))
        return [Input(path, path.name, path.stat().st_size, 0) for path in found]


@dataclass(frozen=True)
class ReadAgain:
    """parts.Read of what Parts wrote; each document's metadata["duplicate"] is what `codes` say of it."""

    codes: Path | None

    def __call__(self, file: Input, start: int) -> Iterator[tuple[Document, int]]:
        import orjson

        codes = np.load(self.codes / f"{file.name.removesuffix('.jsonl.zst')}.npy") if self.codes else None
        for n, line in enumerate(_lines(file.path)):
            if n < start:
                continue
            body = orjson.loads(line)
            doc = Document(body.pop("text"), body.pop("id"), metadata=body)
            if codes is not None:
                doc.metadata["duplicate"] = int(codes[n])
            yield doc, n + 1


def _lines(path: Path) -> list[bytes]:
    """Raises UserError where the file is not whole."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        text = frame.decompress(path.read_bytes())
    except zstandard.ZstdError as e:
        raise UserError(f"{path}: damaged ({e}): delete the output and run the same command again") from None
    if not frame.eof:
        raise UserError(f"{path}: cut off: delete the output and run the same command again")
    return text.splitlines()

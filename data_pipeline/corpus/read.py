"""Raw files -> documents. Reads in two stages, so that one process can walk the input and many can parse it:

    records(corpus)        walks the files in sorted order and cuts the input in pieces that are cheap to hand over
    parse(record, corpus)  makes documents of a piece: decodes, parses, checks

Whatever becomes no document comes out as a `Dropped` with a reason, in its place. Memory is bounded: a whole text file,
a book, a line of JSON or a row of a table is the most that is held at once, and each has a limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from conf.errors import UserError
from data_pipeline.corpus import epub, parquet, pydocs
from data_pipeline.corpus.config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.inputs import Document, Input, files_at, listed
from data_pipeline.corpus.lines import lines
from data_pipeline.corpus.report import Dropped, Report

MAX_FILE = 1 << 30  # bytes of a text file, which is one document
MAX_LINE = 1 << 26  # bytes of a JSON line, which is one document
BLOCK = 1 << 20  # bytes of lines that one record holds
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, slots=True)
class Record:
    """A piece of one file: the whole file, or some whole lines (jsonl) or rows (parquet) of it. `size` is its share on
    the disk."""

    file: Input
    size: int
    lines: bytes | None = None
    first_line: int = 1
    rows: range | None = None


def documents(corpus: CorpusConfig, report: Report) -> Iterator[Document]:
    """Every document of the corpus, in order; `report` counts them and whatever was dropped.

    Raises:
        UserError: there is nothing at `corpus.path`, or no document in it.
    """
    for record in records(corpus, inputs(corpus)):
        for item in parse(record, corpus):
            if isinstance(item, Dropped):
                report.drop(item)
            else:
                report.kept += 1
                yield item
    if not report.kept:
        raise empty(corpus, report)


def empty(corpus: CorpusConfig, report: Report) -> UserError:
    return UserError(
        f"corpus={corpus.name}: no document in corpus.path={corpus.path} ({report.summary()}): "
        f"give a corpus.path with {corpus.format.value} files that hold text"
    )


def inputs(corpus: CorpusConfig) -> list[Input]:
    """The regular files of the corpus, sorted by name; hidden ones and hidden folders are left alone.

    Raises:
        UserError: no such path, or no file there.
    """
    if corpus.format in (CorpusFormat.warc, CorpusFormat.links):
        raise UserError(
            f"corpus.format={corpus.format.value} holds no documents yet: make them with data_pipeline.prepare.run, "
            f"then read its output with corpus=jsonl"
        )
    if corpus.format is CorpusFormat.pydocs:
        found = listed(pydocs.root(), pydocs.files())
    else:
        found = files_at(cast(str, corpus.path))
    if not found:
        raise UserError(
            f"corpus={corpus.name}: no file in corpus.path={corpus.path}: name a file, a folder or a glob with files"
        )
    return found


def records(corpus: CorpusConfig, files: list[Input]) -> Iterator[Record | Dropped]:
    """Cut the input in pieces; the same pieces each time."""
    for file in files:
        if corpus.format is CorpusFormat.parquet:
            pieces = [Record(file, size, rows=rows) for rows, size in parquet.groups(file)]
            yield from pieces or [Record(file, file.size)]
        elif corpus.format is not CorpusFormat.jsonl:
            yield Record(file, file.size)
        elif file.name.endswith(JSONL):
            yield from _line_blocks(file)
        else:
            yield Dropped(f"not a {', '.join(JSONL)} file", file.name)


def parse(record: Record | Dropped, corpus: CorpusConfig) -> Iterator[Document | Dropped]:
    """Documents of a piece, and what became none."""
    if isinstance(record, Dropped):
        yield record
    elif corpus.format is CorpusFormat.jsonl:
        for number, line in enumerate(cast(bytes, record.lines).split(b"\n"), record.first_line):
            yield _parse_line(line, f"{record.file.name}:{number}", corpus)
    elif corpus.format is CorpusFormat.parquet:
        yield from _parse_rows(record, corpus)
    else:
        yield from _parse_file(record.file, corpus)


def _parse_rows(record: Record, corpus: CorpusConfig) -> Iterator[Document | Dropped]:
    rows, held = record.rows or range(1), 0
    found = parquet.read(record.file, corpus.name, corpus.text_key, corpus.id_key, MAX_LINE, rows.start, rows.stop)
    for item, _ in found:
        held += len(item.text) if isinstance(item, Document) else 0
        if held > MAX_FILE:
            yield Dropped(f"the rest of a row group of more than {MAX_FILE:,} characters", record.file.name)
            return
        yield item


def _parse_file(file: Input, corpus: CorpusConfig) -> Iterator[Document | Dropped]:
    if file.size > MAX_FILE:
        yield Dropped(f"a file larger than {MAX_FILE:,} bytes", file.name)
        return
    try:
        if corpus.format is CorpusFormat.pydocs:
            found = list(pydocs.texts(file.path))
        elif corpus.format is CorpusFormat.books and file.name.lower().endswith(".epub"):
            found = [(file.name, epub.text_of(file.path))]
        else:
            found = [(file.name, file.path.read_bytes().decode("utf-8"))]
    except epub.BadBook as e:
        yield Dropped(str(e), file.name)
    except UnicodeDecodeError:
        yield Dropped("not UTF-8", file.name)
    except OSError as e:
        yield Dropped(f"cannot be read ({e.strerror})", file.name)
    except (SyntaxError, ValueError):
        yield Dropped("not a source that this Python parses", file.name)
    else:
        for name, text in found:
            yield Document(name, text, corpus.name, file.name) if text.strip() else Dropped("empty", name)


def _parse_line(line: bytes, where: str, corpus: CorpusConfig) -> Document | Dropped:
    try:
        body = json.loads(line.decode("utf-8-sig")) if line.strip() else None
    except UnicodeDecodeError:
        return Dropped("not UTF-8", where)
    except (ValueError, RecursionError):
        return Dropped("not JSON", where)
    if body is None:
        return Dropped("empty", where)
    text = body.get(corpus.text_key) if isinstance(body, dict) else None
    if not isinstance(text, str):
        return Dropped(f"no text in the field {corpus.text_key!r}", where)
    name, url, date = body.get(corpus.id_key), body.get("url"), body.get("date")
    doc = Document(
        id=str(name) if isinstance(name, str | int) else where,
        text=text,
        source=corpus.name,
        path=where,
        url=url if isinstance(url, str) else None,
        date=date if isinstance(date, str) else None,
    )
    try:
        (doc.text + doc.id + (doc.url or "") + (doc.date or "")).encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no encoding of Unicode holds
        return Dropped("not Unicode (a lone surrogate)", where)
    return doc if text.strip() else Dropped("empty", where)


def _line_blocks(file: Input) -> Iterator[Record | Dropped]:
    """Whole lines by the megabyte. A damaged archive gives what can be read of it, then a `Dropped`."""
    block: list[bytes] = []
    held, first, at = 0, 1, 0
    for number, (line, here) in enumerate(lines(file, MAX_LINE), 1):
        if isinstance(line, bytes):
            block.append(line)
            held += len(line)
        if block and (held >= BLOCK or isinstance(line, Dropped)):
            yield Record(file, here - at, b"\n".join(block), first)
            block, held, at = [], 0, here
        if isinstance(line, Dropped):
            yield Dropped(line.reason, f"{file.name}:{number}")
        if not block:
            first = number + 1
    if block:
        yield Record(file, file.size - at, b"\n".join(block), first)

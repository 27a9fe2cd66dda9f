"""Raw files -> documents, for recipes and for shards. Reading has two stages, so that one process can walk the input
and many can parse it:

    records(corpus, files)  walks the files in sorted order and cuts the input in pieces that are cheap to hand over
    parse(record, corpus)   makes documents of a piece: decodes, parses, checks

A record that becomes no document comes out as a `Dropped` with a reason, in its order. Memory is bounded: at most one
text file, book, line of JSON or row of a table is held at once, and each of these has a limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from conf.errors import UserError
from data_pipeline.corpus import epub, parquet, pydocs
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.document import Document, Dropped, field_of, read_document
from data_pipeline.corpus.inputs import Input, listed
from data_pipeline.corpus.kinds import HEAD, LINES, TEXT, charset_of, kind_of
from data_pipeline.corpus.lines import content, lines
from data_pipeline.corpus.remote_inputs import fetched, inputs_at
from data_pipeline.corpus.report import Report

MAX_FILE = 1 << 30  # bytes of a text file, which is one document
MAX_LINE = 1 << 26  # bytes of a JSON line, which is one document
BLOCK = 1 << 20  # bytes of lines that one record holds


@dataclass(frozen=True, slots=True)
class Record:
    """A piece of one file: the whole file, or some whole lines (jsonl) or rows (parquet) of it.

    `size` is its number of bytes on the disk.
    """

    file: Input
    size: int
    lines: bytes | None = None
    first_line: int = 1
    rows: range | None = None


def documents(corpus: CorpusConfig, report: Report) -> Iterator[Document]:
    """Every document of the corpus, in order; `report` counts them and the dropped records.

    Raises:
        UserError: there is nothing at `corpus.path`, or no document in it.
    """
    for file in inputs(corpus):
        with TemporaryDirectory() as copies:
            yield from report.kept(items(corpus, [fetched(file, Path(copies))]))
    if not report.given.documents:
        raise empty(corpus, report)


def empty(corpus: CorpusConfig, report: Report) -> UserError:
    return UserError(
        f"corpus={corpus.name}: no document in corpus.path={corpus.path} ({report.summary()}): "
        f"give a corpus.path with {corpus.format.value} files that hold text"
    )


def inputs(corpus: CorpusConfig) -> list[Input]:
    """The regular files of the corpus, sorted by name; hidden files and folders are left out. Some may have a URL.

    Raises:
        UserError: no such path, or no file there.
    """
    if corpus.format in (CorpusFormat.warc, CorpusFormat.links):
        raise UserError(
            f"corpus.format={corpus.format.value} holds no documents yet: make them with data_pipeline.prepare.run, "
            f"then read its output with corpus=jsonl"
        )
    if corpus.format is CorpusFormat.pydocs:
        return listed(pydocs.root(), pydocs.files())
    if not (files := inputs_at(cast(str, corpus.path), "corpus.path")):
        raise UserError(
            f"corpus={corpus.name}: no file in corpus.path={corpus.path}: name a file, a folder or a glob with files"
        )
    return files


def items(corpus: CorpusConfig, files: Iterable[Input]) -> Iterator[Document | Dropped]:
    """Every document of the files and every dropped record, in order."""
    for record in records(corpus, files):
        yield from parse(record, corpus)


def items_from(corpus: CorpusConfig, file: Input, start: int) -> Iterator[tuple[Document | Dropped, int]]:
    """The items of one file from a position on, each with the position behind it.

    A position is a number of items, of a table a number of rows. Lines before `start` are not parsed.
    """
    if corpus.format is CorpusFormat.parquet:
        yield from parquet.read(file, corpus.name, corpus.text_key, corpus.id_key, MAX_LINE, start)
        return
    position = 0
    for record in records(corpus, [file]):
        if isinstance(record, Record) and record.lines is not None:
            count = record.lines.count(b"\n") + 1
            if position + count <= start:
                position += count
                continue
        for item in parse(record, corpus):
            position += 1
            if position > start:
                yield item, position


def records(corpus: CorpusConfig, files: Iterable[Input]) -> Iterator[Record | Dropped]:
    """The pieces of the input; the same pieces each time."""
    for file in files:
        if corpus.format is CorpusFormat.parquet:
            pieces = [Record(file, size, rows=rows) for rows, size in parquet.groups(file)]
            yield from pieces or [Record(file, file.size)]
        elif corpus.format is not CorpusFormat.jsonl:
            yield Record(file, file.size)
        elif (kind := kind_of(head_of(file), file.name)) == LINES:
            yield from _line_blocks(file)
        else:
            yield Dropped("no JSON lines" if kind == TEXT else kind, file.name)


def parse(record: Record | Dropped, corpus: CorpusConfig) -> Iterator[Document | Dropped]:
    """The documents of a piece, and a `Dropped` for each record that became none."""
    if isinstance(record, Dropped):
        yield record
    elif record.lines is not None:
        for number, line in enumerate(record.lines.split(b"\n"), record.first_line):
            yield _parse_line(line, f"{record.file.name}:{number}", corpus)
    elif corpus.format is CorpusFormat.parquet:
        yield from _parse_rows(record, corpus)
    else:
        yield from _parse_file(record.file, corpus)


def _parse_rows(record: Record, corpus: CorpusConfig) -> Iterator[Document | Dropped]:
    rows, held = record.rows or range(1), 0
    table = parquet.read(record.file, corpus.name, corpus.text_key, corpus.id_key, MAX_LINE, rows.start, rows.stop)
    for item, _ in table:
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
            texts = list(pydocs.texts(file.path))
        elif corpus.format is CorpusFormat.books and file.name.lower().endswith(".epub"):
            texts = [(file.name, epub.text_of(file.path))]
        else:
            texts = [(file.name, _plain_text(file))]
    except (epub.BadBook, NotText) as e:
        yield Dropped(str(e), file.name)
    except UnicodeDecodeError:
        yield Dropped("not UTF-8", file.name)
    except OSError as e:
        yield Dropped(f"cannot be read ({e.strerror or e})", file.name)
    except (SyntaxError, ValueError):
        yield Dropped("not a source that this Python parses", file.name)
    else:
        for name, text in texts:
            yield read_document(text, name, corpus.name, file.name) if text.strip() else Dropped("empty", name)


class NotText(Exception):
    """A file of another kind; the message says which."""


def _plain_text(file: Input) -> str:
    """The text of a file, decompressed, in UTF-8 or as its byte order mark says.

    Raises:
        NotText: it is of another kind, such as a tar or an HTML page, or larger than MAX_FILE.
        UnicodeDecodeError, OSError: it is not so encoded, or damaged.
    """
    if (kind := kind_of(head_of(file), file.name)) != TEXT:
        raise NotText(kind)
    data = bytearray()
    with file.path.open("rb") as raw:
        for piece in content(raw, file.name):
            data += piece
            if len(data) > MAX_FILE:
                raise NotText(f"a file larger than {MAX_FILE:,} bytes")
    text = data.decode(charset_of(data))
    if "\0" in text:
        raise NotText("not text: it holds zeros")
    return text


def _parse_line(line: bytes, path: str, corpus: CorpusConfig) -> Document | Dropped:
    try:
        body = json.loads(line.decode("utf-8-sig")) if line.strip() else None
    except UnicodeDecodeError:
        return Dropped("not UTF-8", path)
    except (ValueError, RecursionError):
        return Dropped("not JSON", path)
    if body is None:
        return Dropped("empty", path)
    text = field_of(body, corpus.text_key)
    if not isinstance(text, str):
        return Dropped(f"no text in the field {corpus.text_key!r}", path)
    doc = read_document(text, field_of(body, corpus.id_key), corpus.name, path, body.get("url"), body.get("date"))
    try:
        "".join((text, doc.id, doc.metadata.get("url", ""), doc.metadata.get("date", ""))).encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no encoding of Unicode holds
        return Dropped("not Unicode (a lone surrogate)", path)
    return doc if text.strip() else Dropped("empty", path)


def head_of(file: Input) -> bytes:
    """The first bytes of a file, decompressed; of a damaged one those that can be had."""
    data = bytearray()
    with suppress(OSError), file.path.open("rb") as raw:
        for piece in content(raw, file.name):
            data += piece
            if len(data) >= HEAD:
                break
    return bytes(data[:HEAD])


def _line_blocks(file: Input) -> Iterator[Record | Dropped]:
    """Whole lines by the megabyte. A damaged archive gives its readable lines, then a `Dropped`."""
    block: list[bytes] = []
    held, first, start = 0, 1, 0
    for number, (line, end) in enumerate(lines(file, MAX_LINE), 1):
        if isinstance(line, bytes):
            block.append(line)
            held += len(line)
        if block and (held >= BLOCK or isinstance(line, Dropped)):
            yield Record(file, end - start, b"\n".join(block), first)
            block, held, start = [], 0, end
        if isinstance(line, Dropped):
            yield Dropped(line.reason, f"{file.name}:{number}")
        if not block:
            first = number + 1
    if block:
        yield Record(file, file.size - start, b"\n".join(block), first)

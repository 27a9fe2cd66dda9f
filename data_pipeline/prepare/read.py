"""Raw files -> documents. Reads in two stages, so that one process can walk the input and many can parse it:

    records(corpus)        walks the files in sorted order and cuts the input in pieces that are cheap to hand over
    parse(record, corpus)  makes documents of a piece: decodes, parses, checks

Whatever becomes no document comes out as a `Dropped` with a reason, in its place. Memory is bounded: a whole text file
or a line of JSON is the most that is held at once, and both have a limit.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from data_pipeline.config import CorpusConfig, CorpusFormat, UserError
from data_pipeline.prepare import pydocs
from data_pipeline.prepare.report import Dropped, Report

MAX_FILE = 1 << 30  # bytes of a text file, which is one document
MAX_LINE = 1 << 26  # bytes of a JSON line, which is one document
BLOCK = 1 << 20  # bytes of lines that one record holds
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, slots=True)
class Document:
    """`id`, `path` and `source` (the corpus) say where `text` came from; paths are relative to the corpus."""

    id: str
    text: str
    source: str
    path: str
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """One file of the corpus; `name` is its path relative to the corpus."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Record:
    """A piece of one file: the whole file, or (jsonl) some whole lines of it. `size` is its share on the disk."""

    file: Input
    size: int
    lines: bytes | None = None
    first_line: int = 1


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
    if corpus.format is CorpusFormat.pydocs:
        root, paths = pydocs.root(), pydocs.files()
    else:
        root, paths = _find(cast(str, corpus.path))
    found = []
    for path in paths:
        stat = path.stat()
        name = os.fsencode(path.relative_to(root)).decode(errors="backslashreplace")  # a name may be no Unicode
        found.append(Input(path, name, stat.st_size, stat.st_mtime_ns))
    if not found:
        raise UserError(
            f"corpus={corpus.name}: no file in corpus.path={corpus.path}: name a file, a folder or a glob with files"
        )
    return sorted(found, key=lambda i: i.name)


def _find(where: str) -> tuple[Path, list[Path]]:
    path = Path(where)
    if path.is_dir():
        return path, [p for p in _walk(path) if p.is_file()]
    if path.is_file():
        return path.parent, [path]
    if not glob.has_magic(where):
        raise UserError(f"corpus.path={where}: no such file or folder")
    fixed = next(p for p in path.parents if not glob.has_magic(str(p)))
    found = fixed.glob(str(path.relative_to(fixed)))
    return fixed, [p for p in found if p.is_file() and not any(_hidden(part) for part in p.relative_to(fixed).parts)]


def _walk(top: Path) -> Iterator[Path]:
    """What is in a folder and below, links to folders followed; each folder is entered once, whatever leads there.

    Raises:
        UserError: a folder that cannot be read.
    """

    def refuse(e: OSError) -> None:
        raise UserError(f"corpus.path={top}: {e.filename}: {e.strerror}: make it readable, or name another path")

    seen = set()
    for folder, below, names in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not _hidden(name))
        yield from (Path(folder) / name for name in names if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".")


def records(corpus: CorpusConfig, files: list[Input]) -> Iterator[Record | Dropped]:
    """Cut the input in pieces; the same pieces each time."""
    for file in files:
        if corpus.format is not CorpusFormat.jsonl:
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
    else:
        yield from _parse_file(record.file, corpus)


def _parse_file(file: Input, corpus: CorpusConfig) -> Iterator[Document | Dropped]:
    if file.size > MAX_FILE:
        yield Dropped(f"a file larger than {MAX_FILE:,} bytes", file.name)
        return
    try:
        if corpus.format is CorpusFormat.pydocs:
            found = list(pydocs.texts(file.path))
        else:
            found = [(file.name, file.path.read_bytes().decode("utf-8"))]
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
    name, url = body.get(corpus.id_key), body.get("url")
    doc = Document(
        id=str(name) if isinstance(name, str | int) else where,
        text=text,
        source=corpus.name,
        path=where,
        url=url if isinstance(url, str) else None,
    )
    try:
        (doc.text + doc.id + (doc.url or "")).encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no encoding of Unicode holds
        return Dropped("not Unicode (a lone surrogate)", where)
    return doc if text.strip() else Dropped("empty", where)


def _line_blocks(file: Input) -> Iterator[Record | Dropped]:
    """Whole lines by the megabyte. A damaged archive gives what can be read of it, then a `Dropped`."""
    lines: list[bytes] = []
    held, first, at = 0, 1, 0
    for number, (line, here) in enumerate(_lines(file), 1):
        if isinstance(line, bytes):
            lines.append(line)
            held += len(line)
        if lines and (held >= BLOCK or isinstance(line, Dropped)):
            yield Record(file, here - at, b"\n".join(lines), first)
            lines, held, at = [], 0, here
        if isinstance(line, Dropped):
            yield Dropped(line.reason, f"{file.name}:{number}")
        if not lines:
            first = number + 1
    if lines:
        yield Record(file, file.size - at, b"\n".join(lines), first)


def _lines(file: Input) -> Iterator[tuple[bytes | Dropped, int]]:
    """Each line without its end, and how far into the file on disk it was read."""
    try:
        with file.path.open("rb") as raw:
            for line in _split(_chunks(raw, file.name)):
                yield Dropped(f"a line longer than {MAX_LINE:,} bytes", "") if line is None else line, raw.tell()
    except (OSError, EOFError, zlib.error) as e:
        yield Dropped(f"the rest of the file cannot be read ({getattr(e, 'strerror', None) or e})", ""), file.size


def _split(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines, or None for one that is longer than MAX_LINE: a bomb is read through, never held."""
    held, too_long = bytearray(), False
    for chunk in chunks:
        piece, *rest = chunk.split(b"\n")
        held += piece
        for piece in rest:
            yield None if too_long or len(held) > MAX_LINE else bytes(held)
            held, too_long = bytearray(piece), False
        if len(held) > MAX_LINE:
            held, too_long = bytearray(), True
    if held or too_long:
        yield None if too_long else bytes(held)


def _chunks(raw: IO[bytes], name: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed, a few at a time.

    Raises:
        OSError, EOFError, zlib.error: it is damaged or cut off.
    """
    if name.endswith(".zst"):
        yield from _zstd_chunks(raw)
    else:
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if name.endswith(".gz") else raw
        while chunk := stream.read(1 << 16):
            yield chunk


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: zstandard's own stream_reader takes a file that is cut off for one that ended."""
    try:
        import zstandard
    except ImportError:
        raise UserError("a .zst file needs the zstandard package: pip install 'gradus[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)  # as the zstd program's own limit
    step = 1 << 9  # 4 bytes can hold a block of 128 KiB: no chunk is more than 16 MiB
    chunk = raw.read(step)
    try:
        while chunk:
            frame = decompressor.decompressobj()
            while not frame.eof:
                if not chunk:
                    raise EOFError("it is cut off")
                yield frame.decompress(chunk)
                chunk = (frame.unused_data if frame.eof else b"") or raw.read(step)
    except zstandard.ZstdError as e:
        raise OSError(str(e)) from None

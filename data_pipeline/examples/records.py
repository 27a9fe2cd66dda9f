"""The records of files of JSON lines, JSON arrays, TSV and Parquet, each with its place; or the reason for having none.

Files may come from anyone: a line, a value or a row is bounded in bytes, and whatever a file holds, nothing of it runs.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from conf.errors import UserError
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import Input, files_at
from data_pipeline.corpus.lines import codec_of, content, lines

LONGEST = 1 << 24  # bytes of a record
ROWS = 16  # of a Parquet table that are decoded at a time
_NAMES = re.compile(r"\.(json|jsonl|ndjson|jsonlines|tsv|parquet)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,]*")
_TOO_LONG = f"a record longer than {LONGEST:,} bytes"


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of a record. `path` is file:line, in a JSON array or a Parquet table file:number of the record."""

    fields: dict[str, Any]
    path: str


def records(path: str, columns: Sequence[str] = ()) -> Iterator[Record | Dropped]:
    """Every record of the files at `path`, in the order of their names.

    Args:
        columns: of TSV files without a line of names.

    Raises:
        UserError: no file there, or one of another kind.
    """
    files = [file for file in files_at(path, "path") if _NAMES.search(file.name)]
    if not files:
        raise UserError(f"path={path}: no .json, .jsonl, .tsv or .parquet file there: give one, or a folder of some")
    for file in files:
        named = _NAMES.search(file.name)
        kind = named.group(1).lower() if named else ""
        if kind == "parquet":
            yield from _parquet(file)
        elif kind == "tsv":
            yield from _tsv(file, columns)
        elif _is_array(file):
            yield from _array(file)
        else:
            yield from _json_lines(file)


def _json_lines(file: Input) -> Iterator[Record | Dropped]:
    for path, line in _lines(file):
        if isinstance(line, Dropped):
            yield line
            continue
        try:
            yield _record(json.loads(line), path)
        except (ValueError, RecursionError):
            yield Dropped("not JSON", path)


def _record(value: Any, path: str) -> Record | Dropped:
    return Record(value, path) if isinstance(value, dict) else Dropped("not an object with fields", path)


def _lines(file: Input) -> Iterator[tuple[str, str | Dropped]]:
    """(file:line, text) of each line that is not blank."""
    for number, (line, _) in enumerate(lines(file, LONGEST), 1):
        path = f"{file.name}:{number}"
        if isinstance(line, Dropped):
            yield path, Dropped(line.reason, path)
            continue
        try:
            text = line.decode().removeprefix("\ufeff" if number == 1 else "").removesuffix("\r")
        except UnicodeDecodeError:
            yield path, Dropped("not UTF-8", path)
            continue
        if text.strip():
            yield path, text


def _is_array(file: Input) -> bool:
    with file.path.open("rb") as raw:
        try:
            head = next(content(raw, file.name), b"")
        except OSError:  # the reader of lines says so
            return False
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _array(file: Input) -> Iterator[Record | Dropped]:
    number = 0
    with file.path.open("rb") as raw:
        try:
            for value in _values(codecs.iterdecode(content(raw, file.name), "utf-8")):
                number += 1
                yield _record(value, f"{file.name}:{number}")
        except (OSError, ValueError, RecursionError) as e:
            yield Dropped(f"the rest of the file is no array of JSON ({_why(e)})", f"{file.name}:{number + 1}")


def _why(error: Exception) -> str:
    """A few words that do not depend on the file's content, so that equal failures are counted together."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _values(pieces: Iterable[str]) -> Iterator[Any]:
    """The values of a JSON array that comes in pieces; holds about one value at a time.

    Raises:
        ValueError: no array, or one that is cut off, or a value that is too long.
    """
    decode, text, at, enough = json.JSONDecoder().raw_decode, "", -1, 0
    for piece in chain(pieces, [""]):  # the empty one: the end
        text = text[max(at, 0) :] + piece
        at = text.index("[") + 1 if at < 0 else 0
        if piece and len(text) < enough:
            continue
        while (at := _end(_BETWEEN, text, at)) < len(text):
            if text[at] == "]":
                return
            try:
                value, at = decode(text, at)
            except ValueError:
                if len(text) - at > LONGEST:
                    raise ValueError(_TOO_LONG) from None
                if not piece:
                    raise
                break
            yield value
        enough = 2 * (len(text) - at)  # so that a long value is tried a few times, not once for each piece
    raise ValueError("it is cut off")


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _tsv(file: Input, columns: Sequence[str]) -> Iterator[Record | Dropped]:
    names = list(columns)
    for path, line in _lines(file):
        if isinstance(line, Dropped):
            yield line
        elif not names:
            names = line.split("\t")
        elif len(cells := line.split("\t")) != len(names):
            yield Dropped("a row with more or fewer columns than there are names", path)
        else:
            yield Record(dict(zip(names, cells, strict=True)), path)


def _parquet(file: Input) -> Iterator[Record | Dropped]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("a .parquet file needs the pyarrow package: pip install 'gradus[data]'") from None
    if codec_of(file.name) is not None:
        raise UserError(f"{file.path}: a Parquet table is compressed inside: unpack the file")
    number = 0
    try:
        with ParquetFile(file.path) as table:
            for batch in table.iter_batches(ROWS, use_threads=False):
                for i in range(len(batch)):
                    number += 1
                    row, path = batch.slice(i, 1), f"{file.name}:{number}"
                    yield Dropped(_TOO_LONG, path) if row.nbytes > LONGEST else Record(row.to_pylist()[0], path)
    except (ArrowException, OSError, ValueError):
        yield Dropped("the rest of the table cannot be read", f"{file.name}:{number + 1}")

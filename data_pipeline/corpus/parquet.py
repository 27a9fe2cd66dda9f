"""Parquet tables of documents, as FineWeb's: columns text, id and perhaps url and date; the row number is the place.

Strings are read as indices into a dictionary, which costs time (200 instead of 1,000 MB/s) and bounds the memory: a
megabyte that a small file repeats a thousand times is held once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.corpus.inputs import Document, Input
from data_pipeline.corpus.report import Dropped

ROWS = 256  # that are decoded at a time


def groups(file: Input) -> Iterator[tuple[range, int]]:
    """(its rows, their share of the file's bytes) for each row group; nothing for a file that is no table."""
    try:
        with _opened(file, ()) as table:
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
    except _errors():
        return
    at, total = 0, max(1, sum(sizes))
    for rows in sizes:
        yield range(at, at + rows), file.size * (at + rows) // total - file.size * at // total
        at += rows


def read(
    file: Input, source: str, text_key: str, id_key: str, longest: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[Document | Dropped, int]]:
    """The documents of the rows from `start` to `stop`, each with the number of the row to go on at.

    A text of more than `longest` bytes is dropped. A row group that is damaged gives what can be read of it, then a
    `Dropped` for its rest.
    """
    keys = (text_key, id_key, "url", "date")
    try:
        with _opened(file, keys) as table:
            names = set(table.schema_arrow.names)
            if text_key not in names or not _is_text(table.schema_arrow.field(text_key).type):
                yield Dropped(f"no column of text {text_key!r}", file.name), table.metadata.num_rows
                return
            end = 0
            for number in range(table.metadata.num_row_groups):
                at, end = end, end + table.metadata.row_group(number).num_rows
                wanted = range(max(at, start), end if stop is None else min(end, stop))
                if not wanted:
                    continue
                try:
                    for batch in table.iter_batches(ROWS, [number], sorted(names & {*keys}), use_threads=False):
                        for row in range(max(at, wanted.start), min(at + len(batch), wanted.stop)):
                            where = f"{file.name}:{row + 1}"
                            yield _document(batch, row - at, where, source, text_key, id_key, longest), row + 1
                        at += len(batch)
                except _errors():
                    yield Dropped("the rest of the row group cannot be read", f"{file.name}:{at + 1}"), wanted.stop
    except _errors():
        yield Dropped("not a Parquet table that can be read", file.name), start


def _document(
    batch: Any, i: int, where: str, source: str, text_key: str, id_key: str, longest: int
) -> Document | Dropped:
    def of(key: str) -> Any:
        return batch.column(key)[i] if key in batch.schema.names else None

    scalar = of(text_key)
    value = getattr(scalar, "value", scalar)  # of a dictionary
    held = value.as_buffer() if value is not None and value.is_valid else None
    if held is not None and held.size > longest:
        return Dropped(f"a text longer than {longest:,} bytes", where)
    if held is None:
        return Dropped(f"no text in the column {text_key!r}", where)
    try:
        text = held.to_pybytes().decode()
        name, url, date = (None if of(key) is None else of(key).as_py() for key in (id_key, "url", "date"))
    except UnicodeDecodeError:
        return Dropped("not UTF-8", where)
    if not text.strip():
        return Dropped("empty", where)
    return Document(
        id=str(name) if isinstance(name, str | int) else where,
        text=text,
        source=source,
        path=where,
        url=url if isinstance(url, str) else None,
        date=None if date is None else date if isinstance(date, str) else getattr(date, "isoformat", lambda: None)(),
    )


def _opened(file: Input, strings: tuple[str, ...]) -> Any:
    from pyarrow.parquet import ParquetFile, read_metadata

    about = read_metadata(file.path)
    kinds = {field.name: field.type for field in about.schema.to_arrow_schema()}
    there = [key for key in dict.fromkeys(strings) if key in kinds and _is_text(kinds[key])]
    return ParquetFile(file.path, metadata=about, read_dictionary=there)


def _errors() -> tuple[type[BaseException], ...]:
    from pyarrow import ArrowException

    return ArrowException, OSError, ValueError


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(of(kind) for of in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary))

"""Parquet tables of documents in FineWeb's form: columns text, id and perhaps url and date; a position is a row number.

Strings are read as indices into a dictionary, which costs time (200 instead of 1,000 MB/s) and bounds the memory: a
megabyte that a small file repeats a thousand times is held once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.corpus.document import Document, Dropped, read_document
from data_pipeline.corpus.inputs import Input

ROWS = 256  # that are decoded at a time


def groups(file: Input) -> Iterator[tuple[range, int]]:
    """(rows, number of bytes on the disk) of each row group; nothing for a file that is no table."""
    try:
        with _opened(file, ()) as table:
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
    except _errors():
        return
    start, total = 0, max(1, sum(sizes))
    for rows in sizes:
        end = start + rows
        yield range(start, end), file.size * end // total - file.size * start // total
        start = end


def read(
    file: Input, source: str, text_key: str, id_key: str, longest: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[Document | Dropped, int]]:
    """The documents of the rows from `start` to `stop`, each with the number of the next row.

    A text of more than `longest` bytes is dropped. A damaged row group gives its readable rows, then a `Dropped` for
    the rest of it.
    """
    keys = (text_key, id_key, "url", "date")
    try:
        with _opened(file, keys) as table:
            schema = table.schema_arrow
            if fault := _fault(schema, keys):
                yield Dropped(fault, file.name), table.metadata.num_rows
                return
            columns = [key for key in dict.fromkeys(keys) if _type_of(schema, key) is not None]
            end = 0
            for number in range(table.metadata.num_row_groups):
                first, end = end, end + table.metadata.row_group(number).num_rows  # row of the next batch, of the end
                wanted = range(max(first, start), end if stop is None else min(end, stop))
                if not wanted:
                    continue
                try:
                    for batch in table.iter_batches(ROWS, [number], columns, use_threads=False):
                        for row in range(max(first, wanted.start), min(first + len(batch), wanted.stop)):
                            path = f"{file.name}:{row + 1}"
                            yield _document(batch, row - first, path, source, text_key, id_key, longest), row + 1
                        first += len(batch)
                except _errors():
                    yield Dropped("the rest of the row group cannot be read", f"{file.name}:{first + 1}"), wanted.stop
    except _errors():
        yield Dropped("not a Parquet table that can be read", file.name), start


def _document(
    batch: Any, i: int, path: str, source: str, text_key: str, id_key: str, longest: int
) -> Document | Dropped:
    def of(key: str) -> Any:
        """The cell of a column, or of a struct's field."""
        name = key if key in batch.schema.names else key.partition(".")[0]
        if name not in batch.schema.names:
            return None
        column, names = batch.column(name), key[len(name) + 1 :]
        for field in names.split(".") if names else ():
            column = column.field(field)
        return column[i]

    scalar = of(text_key)
    value = getattr(scalar, "value", scalar)  # of a dictionary
    held = value.as_buffer() if value is not None and value.is_valid else None
    if held is not None and held.size > longest:
        return Dropped(f"a text longer than {longest:,} bytes", path)
    if held is None:
        return Dropped(f"no text in the column {text_key!r}", path)
    try:
        text = held.to_pybytes().decode()
        name, url, date = (None if of(key) is None else of(key).as_py() for key in (id_key, "url", "date"))
    except UnicodeDecodeError:
        return Dropped("not UTF-8", path)
    if not text.strip():
        return Dropped("empty", path)
    day = date if isinstance(date, str) else getattr(date, "isoformat", lambda: None)()
    return read_document(text, name, source, path, url, day)


def _opened(file: Input, strings: tuple[str, ...]) -> Any:
    from pyarrow.parquet import ParquetFile, read_metadata

    about = read_metadata(file.path)
    schema = about.schema.to_arrow_schema()
    columns = [key for key in dict.fromkeys(strings) if (kind := _type_of(schema, key)) and _is_text(kind)]
    return ParquetFile(file.path, metadata=about, read_dictionary=columns)


def _type_of(schema: Any, key: str) -> Any:
    """The type of a column, or of `a.b`, the field b of the struct a; None if there is none."""
    from pyarrow import types

    if key in schema.names:
        return schema.types[schema.names.index(key)]
    name, *fields = key.split(".")
    if not fields or name not in schema.names:
        return None
    kind = schema.types[schema.names.index(name)]
    for field in fields:
        if not types.is_struct(kind) or kind.get_field_index(field) < 0:
            return None
        kind = kind.field(field).type
    return kind


def _fault(schema: Any, keys: tuple[str, ...]) -> str | None:
    """The reason why a table gives no documents, or None."""
    for key in keys:
        if (count := schema.names.count(key)) > 1:
            return f"{count} columns {key!r}: rename all but one"
    kind = _type_of(schema, keys[0])
    if kind is None or not _is_text(kind):
        return f"no column of text {keys[0]!r}"
    return None


def _errors() -> tuple[type[BaseException], ...]:
    from pyarrow import ArrowException

    return ArrowException, OSError, ValueError


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    strings = types.is_string, types.is_large_string, types.is_string_view
    return any(of(kind) for of in (*strings, types.is_binary, types.is_large_binary, types.is_binary_view))

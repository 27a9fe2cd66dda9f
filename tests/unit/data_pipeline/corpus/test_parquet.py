"""Parquet tables: every row is a document or a reason, from any row on, and damage costs what it hits."""

from __future__ import annotations

import datetime
import secrets
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.corpus import parquet
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.document import Document, Dropped, read_document
from data_pipeline.corpus.inputs import Input, files_at
from data_pipeline.corpus.read import documents
from data_pipeline.corpus.report import Report
from tests.helpers.seeds import seeded
from tests.unit.data_pipeline.corpus.test_read import counts


def write(path: Path, columns: dict[str, Any], **options: Any) -> Input:
    pq.write_table(pa.table(columns), path, **options)
    return files_at(str(path))[0]


def read(file: Input, start: int = 0, stop: int | None = None) -> list[tuple[Document | Dropped, int]]:
    return list(parquet.read(file, "web", "text", "id", 1000, start, stop))


def test_rows_are_documents_or_have_a_reason(tmp_path: Path) -> None:
    """A row becomes a document with its URL and date, or a reason."""
    day = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
    file = write(
        tmp_path / "a.parquet",
        {
            "text": ["one", None, " ", "x" * 1001, "two"],
            "id": [7, 8, 9, 10, None],
            "url": ["http://x/1", "", "", "", None],
            "date": [day] * 5,
            "language": ["en"] * 5,
        },
    )
    assert read(file) == [
        (read_document("one", 7, "web", "a.parquet:1", "http://x/1", "2020-01-02T00:00:00+00:00"), 1),
        (Dropped("no text in the column 'text'", "a.parquet:2"), 2),
        (Dropped("empty", "a.parquet:3"), 3),
        (Dropped("a text longer than 1,000 bytes", "a.parquet:4"), 4),
        (read_document("two", None, "web", "a.parquet:5", None, "2020-01-02T00:00:00+00:00"), 5),
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.binary_view()])
def test_reading_goes_on_at_any_row(tmp_path: Path, kind: pa.DataType) -> None:
    seed = seeded()
    rng = np.random.default_rng(seed)
    texts = [f"text {i} " + "x" * int(rng.integers(0, 900)) for i in range(700)]
    table = {"text": pa.array(texts).cast(kind), "id": list(range(700))}
    file = write(tmp_path / "a.parquet", table, row_group_size=int(rng.integers(1, 800)))
    for _ in range(8):
        start, stop = sorted(int(n) for n in rng.integers(0, 701, 2))
        found = read(file, start, stop)
        assert [(d.text, n) for d, n in found if isinstance(d, Document)] == [
            (texts[i], i + 1) for i in range(start, stop)
        ], f"seed {seed}"
    assert [n for rows, _ in parquet.groups(file) for n in rows] == list(range(700))
    assert sum(size for _, size in parquet.groups(file)) == file.size


def test_a_damaged_row_group_costs_only_itself(tmp_path: Path) -> None:
    texts = [secrets.token_hex(200) for _ in range(90)]
    file = write(tmp_path / "a.parquet", {"text": texts}, row_group_size=30, use_dictionary=False)
    raw = bytearray(file.path.read_bytes())
    at = pq.ParquetFile(file.path).metadata.row_group(1).column(0).data_page_offset
    raw[at : at + 40] = b"\xff" * 40
    file.path.write_bytes(raw)
    found = read(file)
    assert [d.text for d, _ in found if isinstance(d, Document)] == texts[:30] + texts[60:]
    assert [(d.reason, d.path, n) for d, n in found if isinstance(d, Dropped)] == [
        ("the rest of the row group cannot be read", "a.parquet:31", 60)
    ]
    for damaged in (raw[:-100], b"PAR1", b""):
        file.path.write_bytes(damaged)
        assert read(file) == [(Dropped("not a Parquet table that can be read", "a.parquet"), 0)]


def test_a_text_that_a_small_file_repeats_is_held_once(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"text": ["x" * (1 << 19)] * 500})
    assert file.size < 1 << 20
    pa.default_memory_pool().release_unused()
    tracemalloc.start()
    most = sizes = 0
    for doc, _ in parquet.read(file, "web", "text", "id", 1 << 20):
        sizes += len(doc.text) if isinstance(doc, Document) else 0
        most = max(most, pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert sizes == 500 << 19 and most < 64 << 20


def test_tables_are_a_corpus(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", {"content": ["one", "two", ""], "id": ["1", "2", "3"]}, row_group_size=2)
    write(tmp_path / "c.parquet", {"text": ["three"]})
    (tmp_path / "a.txt").write_text("no table")
    report = Report()
    corpus = CorpusConfig(name="t", format=CorpusFormat.parquet, path=str(tmp_path), text_key="content")
    assert [(d.id, d.text) for d in documents(corpus, report)] == [("1", "one"), ("2", "two")]
    assert counts(report) == {
        "not a Parquet table that can be read": 1,
        "empty": 1,
        "no column of text 'content'": 1,
    }


def test_a_field_of_a_struct_is_a_column_of_text(tmp_path: Path) -> None:
    rows = [{"content": {"text": f"text {i}", "words": i}, "about": {"id": i}} for i in range(600)]
    pq.write_table(pa.Table.from_pylist([*rows, {"content": None, "about": None}]), tmp_path / "a.parquet")
    found = list(parquet.read(files_at(str(tmp_path))[0], "web", "content.text", "about.id", 1000, 7))
    assert [(doc.text, doc.id) for doc, _ in found if isinstance(doc, Document)] == [
        (f"text {i}", str(i)) for i in range(7, 600)
    ]
    assert found[-1] == (Dropped("no text in the column 'content.text'", "a.parquet:601"), 601)
    for key in ("content", "content.words", "content.no", "no.text"):
        (item,) = parquet.read(files_at(str(tmp_path))[0], "web", key, "id", 1000)
        assert item == (Dropped(f"no column of text {key!r}", "a.parquet"), 601)


def test_columns_of_one_name_are_one_reason(tmp_path: Path) -> None:
    columns = [pa.array(["one", "two"])] * 3
    for names, key in ((["text", "text", "id"], "text"), (["text", "id", "id"], "id")):
        pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "a.parquet")
        assert read(files_at(str(tmp_path))[0]) == [(Dropped(f"2 columns {key!r}: rename all but one", "a.parquet"), 2)]

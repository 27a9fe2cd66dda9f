"""Files of every kind in every corpus: what is of another kind is refused by its name, and nothing is read as text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from conf.errors import UserError
from tests.helpers.archives import Made
from tests.unit.data_pipeline.corpus.test_read import corpus, counts, read_all

LINES = b'{"text": "one"}\n{"text": "two"}\n'
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def tar() -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        info = tarfile.TarInfo("000000.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
    return raw.getvalue()


def zipped() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a.txt", "hello")
    return raw.getvalue()


def parquet() -> bytes:
    raw = io.BytesIO()
    pq.write_table(pa.table({"text": ["one"]}), raw)
    return raw.getvalue()


FILES = {
    "a.tar": (tar(), "a tar: unpack it"),
    "b.jsonl": (LINES, "JSON lines: corpus=jsonl reads them"),
    "c": (LINES, "JSON lines: corpus=jsonl reads them"),
    "d.csv": (b"id,text\n1,one\n", "a table of separated values: write it as JSON lines or Parquet"),
    "e.html": (
        b"\n<!-- saved -->\n<!DOCTYPE html><p>one",
        "an HTML page: corpus=common_crawl reads pages in web archives",
    ),
    "f.bin": (bytes(4096), "not text: it holds zeros"),
    "g.txt.gz": (gzip.compress(tar()), "a tar: unpack it"),
    "h.parquet": (parquet(), "a Parquet table: corpus=parquet reads it"),
    "i.warc": (Made(b"<p>one").warc(), "a web archive: corpus=common_crawl reads it"),
    "j.zip": (zipped(), "a ZIP: corpus=books reads EPUBs, unpack any other"),
    "k.json": (
        b'[\n{"text": "one"}\n]\n',
        "JSON that is not one document a line: make it so for corpus=jsonl",
    ),
    "l.txt": (b"%PDF-1.7\n", "a PDF: extract its text"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["text", "books"])
def test_no_file_of_another_kind_is_read_as_text(name: str, kind: str, tmp_path: Path) -> None:
    data, reason = FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as refused:
        read_all(corpus(tmp_path, kind))
    assert f"0 kept; dropped: 1 {reason}" in str(refused.value)
    (tmp_path / "good").write_text("text")
    found, report = read_all(corpus(tmp_path, kind))
    assert [doc.text for doc in found] == ["text"] and counts(report) == {reason: 1}


@pytest.mark.parametrize("text", ["{ a poem\n", "[1] a list\n", "<poem> a, b\n", "def f(): return {}\n", "a,b\n"])
def test_text_that_looks_a_little_like_another_kind_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert [doc.text for doc in read_all(corpus(tmp_path))[0]] == [text]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson", ""])
def test_json_lines_are_known_by_sight(ending: str, packing: str, tmp_path: Path) -> None:
    for name in (f"a{ending}{packing}", "packed-without-saying-so"):
        path = tmp_path / name
        path.write_bytes(PACK[packing](LINES))
        found, report = read_all(corpus(path, "jsonl"))
        assert [doc.text for doc in found] == ["one", "two"] and not report.dropped


@pytest.mark.parametrize("name", ["a.tar", "d.csv", "e.html", "h.parquet", "k.json", "l.txt"])
def test_no_file_of_another_kind_is_read_as_lines(name: str, tmp_path: Path) -> None:
    data, reason = FILES[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good").write_bytes(LINES)
    found, report = read_all(corpus(tmp_path, "jsonl"))
    assert len(found) == 2 and counts(report) == {reason: 1}


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packing", PACK)
def test_text_is_read_as_its_byte_order_mark_says(codec: str, packing: str, tmp_path: Path) -> None:
    (tmp_path / f"a.txt{packing}").write_bytes(PACK[packing]("Größe\r\n中文\r\n".encode(codec)))
    for kind in ("text", "books"):
        assert [doc.text for doc in read_all(corpus(tmp_path, kind))[0]] == ["Größe\n中文\n"]


def test_every_corpus_mends_marks_and_line_ends_alike(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\rthree"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "c.parquet")
    for name, kind in (("a.txt", "text"), ("a.txt", "books"), ("b.jsonl", "jsonl"), ("c.parquet", "parquet")):
        assert [doc.text for doc in read_all(corpus(tmp_path / name, kind))[0]] == ["one\ntwo\nthree"], kind


def test_json_in_utf_16_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES.decode().encode("utf-16"))
    with pytest.raises(UserError, match=r"1 JSON in UTF-16: make it UTF-8 \(iconv -f utf-16 -t utf-8\)"):
        read_all(corpus(tmp_path, "jsonl"))

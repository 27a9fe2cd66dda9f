"""The readers: what becomes a document, and a reason with a count for whatever does not."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from conf.errors import UserError
from data_pipeline.corpus import pydocs, read
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.document import Document
from data_pipeline.corpus.read import documents, inputs
from data_pipeline.corpus.report import Report


def corpus(path: Path | str, kind: str = "text") -> CorpusConfig:
    return CorpusConfig(name=kind, format=CorpusFormat(kind), path=str(path))


def counts(report: Report) -> dict[str, int]:
    return {reason: tally.documents for reason, tally in report.dropped.items()}


def read_all(cfg: CorpusConfig) -> tuple[list[Document], Report]:
    report = Report()
    found = list(documents(cfg, report))
    assert report.given.documents == len(found)
    return found, report


def write_jsonl(path: Path, *lines: object) -> Path:
    body = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(packed(body))
    return path


def test_a_folder_gives_one_document_per_file(tmp_path: Path) -> None:
    """In sorted order; without a byte order mark, and each line ends with \\n."""
    (tmp_path / "b").mkdir()
    for name, text in {"b/2.md": "zwei\r\ndrei\rvier", "a.txt": "\ufeffeins", "c": "drei"}.items():
        (tmp_path / name).write_bytes(text.encode())
    found, report = read_all(corpus(tmp_path))
    assert [(d.id, d.text, d.metadata["path"], d.metadata["source"]) for d in found] == [
        ("a.txt", "eins", "a.txt", "text"),
        ("b/2.md", "zwei\ndrei\nvier", "b/2.md", "text"),
        ("c", "drei", "c", "text"),
    ]
    assert not report.dropped


def test_bad_and_empty_files_are_counted_with_a_reason(tmp_path: Path) -> None:
    """A file that is not UTF-8 and an empty one are skipped and counted."""
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".hidden").write_text("not read")
    found, report = read_all(corpus(tmp_path))
    assert [d.id for d in found] == ["good.txt"]
    assert report.totals() == {
        "kept": 1,
        "dropped": {
            "empty": {"count": 1, "examples": ["blank.txt"]},
            "not UTF-8": {"count": 1, "examples": ["latin.txt"]},
        },
    }
    assert report.summary() == "1 kept; dropped: 1 empty, 1 not UTF-8"


def test_names_are_relative_to_the_folder_of_a_glob(tmp_path: Path) -> None:
    """A glob and a single file give names relative to their folder."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("a")
    (tmp_path / "x" / "b.md").write_text("b")
    assert [d.id for d in read_all(corpus(tmp_path / "*" / "*.txt"))[0]] == ["x/a.txt"]
    assert [d.id for d in read_all(corpus(tmp_path / "x" / "b.md"))[0]] == ["b.md"]


def test_hidden_files_are_left_alone_in_a_glob_as_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", ".b.txt", ".git/c.txt"):
        (tmp_path / name).write_text(name)
    for where in (tmp_path, tmp_path / "*.txt", tmp_path / "**" / "*.txt"):
        assert [d.id for d in read_all(corpus(where))[0]] == ["a.txt"]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """Links to folders are followed, also in a circle, and no folder is read twice."""
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "b" / "1.txt").write_text("one")
    (tmp_path / "out" / "2.txt").write_text("two")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in")
    assert [(d.id, d.text) for d in read_all(corpus(tmp_path / "in"))[0]] == [
        ("again/2.txt", "two"),
        ("b/1.txt", "one"),
    ]


def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # a path that is longer than the system takes: refused even to root, unlike a mode of 0
        os.mkdir("x" * 250, dir_fd=here)
        below = os.open("x" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(UserError, match=r"corpus.path=.*x{250}: File name too long: make it readable"):
        read_all(corpus(tmp_path))


def test_a_name_that_is_not_unicode_becomes_one(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.txt")).write_text("text")
    assert [d.id for d in read_all(corpus(tmp_path))[0]] == ["\\xff.txt"]


def test_a_file_above_the_limit_is_dropped_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_FILE", 10)
    (tmp_path / "long").write_text("x" * 11)
    (tmp_path / "short").write_text("x" * 10)
    found, report = read_all(corpus(tmp_path))
    assert [d.id for d in found] == ["short"]
    assert counts(report) == {"a file larger than 10 bytes": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_counts_each_kind_of_bad_line(tmp_path: Path, suffix: str) -> None:
    write_jsonl(
        tmp_path / f"a{suffix}",
        {"text": "one", "id": "first", "url": "http://x/1"},
        b"{not json",
        {"text": "two"},
        {"body": "no text"},
        [1, 2],
        b"",
        {"text": " "},
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        {"text": "three", "id": 7},
    )
    (tmp_path / "readme.txt").write_text("not jsonl")
    found, report = read_all(corpus(tmp_path, "jsonl"))
    assert [(d.id, d.text, d.metadata.get("url")) for d in found] == [
        ("first", "one", "http://x/1"),
        (f"a{suffix}:3", "two", None),
        ("7", "three", None),
    ]
    assert found[2].metadata["path"] == f"a{suffix}:11"
    assert counts(report) == {
        "not JSON": 2,
        "no text in the field 'text'": 2,
        "empty": 2,
        "not UTF-8": 1,
        "not Unicode (a lone surrogate)": 1,
        "no JSON lines": 1,
    }


def test_dotted_keys_lead_into_objects(tmp_path: Path) -> None:
    rows = (
        {"content": {"text": "one"}, "a": {"b": {"c": 7}}},
        {"content.text": "two", "a.b.c": "x"},
        {"content": "three"},
    )
    cfg = corpus(write_jsonl(tmp_path / "a.jsonl", *rows), "jsonl")
    cfg.text_key, cfg.id_key = "content.text", "a.b.c"
    found, report = read_all(cfg)
    assert [(doc.text, doc.id) for doc in found] == [("one", "7"), ("two", "x")]
    assert counts(report) == {"no text in the field 'content.text'": 1}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_gives_what_is_whole_and_says_so(tmp_path: Path, suffix: str) -> None:
    noise = [{"text": os.urandom(500).hex()} for _ in range(2000)]
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", *noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found, report = read_all(corpus(path, "jsonl"))
    assert 100 < len(found) < 2000
    assert [d.text for d in found] == [n["text"] for n in noise[: len(found)]]
    (reason,) = (r for r in report.dropped if r.startswith("the rest of the file cannot be read"))
    assert [s["id"] for s in report.samples[reason]] == [f"a.jsonl{suffix}:{len(found) + 1}"]


def test_all_frames_and_members_of_a_file_are_read(tmp_path: Path) -> None:
    """Several zstd frames or gzip members in one file."""
    for suffix in (".gz", ".zst"):
        path = write_jsonl(tmp_path / f"a.jsonl{suffix}", {"text": "x"})
        path.write_bytes(path.read_bytes() * 3)
        assert len(read_all(corpus(path, "jsonl"))[0]) == 3


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_decompression_bomb_is_read_in_bounded_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MAX_LINE", 1 << 20)
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", {"text": "a"}, b" " * (100 << 20), {"text": "b"})
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    found, report = read_all(corpus(path, "jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d.id for d in found] == [f"a.jsonl{suffix}:1", f"a.jsonl{suffix}:3"]
    assert counts(report) == {"a line longer than 1,048,576 bytes": 1}
    assert peak < 80 << 20


def test_records_cut_a_long_file_and_lose_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK", 50)
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": f"line {i}"} for i in range(1, 101)))
    path.write_bytes(path.read_bytes()[:-1])  # the last line has no end
    cfg = corpus(path, "jsonl")
    pieces = list(read.records(cfg, inputs(cfg)))
    assert len(pieces) > 10 and sum(p.size for p in pieces) == path.stat().st_size
    assert [(d.id, d.text) for d in read_all(cfg)[0]] == [(f"a.jsonl:{i}", f"line {i}") for i in range(1, 101)]


def test_an_empty_corpus_is_one_line_that_names_path_and_knob(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file in corpus.path=.*: name a file, a folder or a glob"):
        read_all(corpus(tmp_path))
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(UserError, match=r"corpus=text: no document in corpus.path=.*0 kept; dropped: 1 empty"):
        read_all(corpus(tmp_path))
    with pytest.raises(UserError, match=r"corpus.path=.*nowhere: no such file or folder"):
        read_all(corpus(tmp_path / "nowhere"))


def test_pydocs_text_is_what_the_modules_carry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import inspect
    import textwrap
    from pydoc_data.topics import topics

    top = pydocs.root()
    wanted = [top / pydocs.TOPICS, top / "textwrap.py", top / "this.py"]
    monkeypatch.setattr(pydocs, "files", lambda: wanted)
    found, report = read_all(CorpusConfig(name="pydocs", format=CorpusFormat.pydocs))
    texts = {d.id: d.text for d in found}
    assert {f"topics/{k}": v for k, v in topics.items()} == {k: v for k, v in texts.items() if k.startswith("topics/")}
    for thing in (textwrap, textwrap.TextWrapper, textwrap.dedent, textwrap.TextWrapper.fill):
        assert inspect.getdoc(thing) in texts["textwrap.py"]
    assert counts(report) == {"empty": 1}  # this.py has a poem, but no docstring


def test_pydocs_runs_nothing_it_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text('"""Prose."""\nraise SystemExit("it ran")\n')
    monkeypatch.setattr(pydocs, "root", lambda: tmp_path)
    found, _ = read_all(CorpusConfig(name="pydocs", format=CorpusFormat.pydocs))
    assert [(d.id, d.text) for d in found] == [("evil.py", "Prose.")]


@pytest.mark.slow
def test_pydocs_is_a_corpus_worth_training_on() -> None:
    found, _ = read_all(CorpusConfig(name="pydocs", format=CorpusFormat.pydocs))
    assert len(found) >= 600
    assert 1_500_000 < sum(len(d.text.encode()) for d in found) < 4_000_000

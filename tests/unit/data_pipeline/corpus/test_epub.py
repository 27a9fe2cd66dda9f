"""Books: the text of the spine in its order, and a reason for whatever gives none."""

from __future__ import annotations

import random
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from data_pipeline.corpus import epub
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.epub import BadBook, text_of
from data_pipeline.corpus.read import documents
from data_pipeline.corpus.report import Report
from tests.helpers.seeds import seeded
from tests.unit.data_pipeline.corpus.test_read import counts

CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)


def page(body: str) -> str:
    return f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>T</title></head><body>{body}</body></html>'


def opf(*hrefs: str) -> str:
    items = "".join(f'<item id="i{n}" href="{h}" media-type="application/xhtml+xml"/>' for n, h in enumerate(hrefs))
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(hrefs)))
    return f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>'


def book(path: Path, members: dict[str, str | bytes], package: str | None = None) -> Path:
    names = [name.removeprefix("OEBPS/") for name in members if name.startswith("OEBPS/")]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        z.writestr("META-INF/container.xml", CONTAINER)
        z.writestr("OEBPS/book.opf", package or opf(*names))
        for name, body in members.items():
            z.writestr(name, body)
    return path


def test_the_spine_gives_the_order_and_blocks_are_paragraphs(tmp_path: Path) -> None:
    package = opf("text/b%20one.xhtml", "a.xhtml")
    members: dict[str, str | bytes] = {
        "OEBPS/a.xhtml": page("<div><h1>Second</h1><p>Line<br/>two<!-- x --> and &eacute;&nbsp;&amp; tail.</p></div>"),
        "OEBPS/text/b one.xhtml": page("<p>It  was\n<i>dark</i>.</p><script>no()</script><p>Then light.</p>"),
        "OEBPS/notes.xhtml": page("not in the spine"),
    }
    text = text_of(book(tmp_path / "a.epub", members, package))
    assert text == "It was dark.\n\nThen light.\n\nSecond\n\nLine\ntwo and é & tail."


def test_a_closed_title_swallows_no_text(tmp_path: Path) -> None:
    """`<title/>` is a closed tag; a file that is no XML is read as HTML."""
    xml = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head><body><a id="x"/><p>Kept.</p></body></html>'
    broken = "<html><body><p>One<p>Two &copy; <b>bold</body></html>"
    found = text_of(book(tmp_path / "a.epub", {"OEBPS/1.xhtml": xml, "OEBPS/2.xhtml": broken, "OEBPS/3.xhtml": ""}))
    assert found == "Kept.\n\nOne\n\nTwo © bold"


def test_an_entity_reads_no_file_and_does_not_multiply(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("SECRET")
    outside = f'<!DOCTYPE html [<!ENTITY s SYSTEM "file://{tmp_path}/secret">]>' + page("<p>a &s; b</p>")
    levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 9))
    laughs = f'<!DOCTYPE html [<!ENTITY e0 "ha">{levels}]>' + page("<p>c &e8; d</p>")
    assert text_of(book(tmp_path / "a.epub", {"OEBPS/1.xhtml": outside})) == "a b"
    text = text_of(book(tmp_path / "b.epub", {"OEBPS/1.xhtml": laughs}))
    assert "haha" not in text and text.endswith("d") and len(text) < 100


def reason(path: Path) -> str:
    with pytest.raises(BadBook) as caught:
        text_of(path)
    return str(caught.value)


def test_each_bad_book_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, good = tmp_path / "a.epub", {"OEBPS/1.xhtml": page("x")}
    method = '<EncryptionMethod xmlns="http://www.w3.org/2001/04/xmlenc#" Algorithm="{}"/>'
    path.write_bytes(b"no zip")
    assert reason(path) == "not an EPUB"
    locked = {"META-INF/encryption.xml": f"<encryption>{method.format('http://x#aes256-cbc')}</encryption>"}
    assert reason(book(path, good | locked)) == "an encrypted EPUB"
    fonts = {"META-INF/encryption.xml": f"<e>{method.format('http://www.idpf.org/2008/embedding')}</e>"}
    assert text_of(book(path, good | fonts)) == "x"
    for away in ("../../etc/passwd", "/etc/passwd", "http://x/1.xhtml", "..%2F..%2Fa"):
        assert reason(book(path, good, opf(away))) == "an EPUB that names a file outside of it"
    assert reason(book(path, good, opf("2.xhtml"))) == "an EPUB that lacks a file which it names"
    assert reason(book(path, good, "<package")) == "a damaged EPUB"
    assert reason(book(path, {"OEBPS/book.css": "p {}"}, opf())) == "an EPUB without text in its spine"
    raw = bytearray(book(path, {"OEBPS/1.xhtml": page("word " * 5000)}).read_bytes())
    at = raw.index(b"OEBPS/1.xhtml")
    raw[at + 60 : at + 70] = bytes(10)
    path.write_bytes(raw)
    assert reason(path) == "a damaged EPUB"
    monkeypatch.setattr(epub, "MAX_DIRECTORY", 100)
    assert reason(book(path, good)) == "an EPUB of too many files"


def test_a_member_that_is_a_link_leads_nowhere(tmp_path: Path) -> None:
    path = book(tmp_path / "a.epub", {}, opf("1.xhtml"))
    (tmp_path / "secret").write_text("SECRET")
    with zipfile.ZipFile(path, "a") as z:
        link = zipfile.ZipInfo("OEBPS/1.xhtml")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        z.writestr(link, str(tmp_path / "secret"))
    assert reason(path) == "an EPUB with a link in place of a file"


def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    """The sizes in the ZIP's directory are not believed."""
    path = book(tmp_path / "a.epub", {"OEBPS/1.xhtml": page("<p>" + " " * (60 << 20) + "</p>")})
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    assert reason(path) == "an EPUB that unpacks to too much"
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\1\2", 0, raw.rindex(b"OEBPS/1.xhtml"))
    raw[at + 24 : at + 28] = struct.pack("<I", 10)  # the directory claims ten bytes
    path.write_bytes(raw)
    assert reason(path) in ("a damaged EPUB", "an EPUB that unpacks to too much")


def test_any_damage_is_a_reason_and_never_another_error(tmp_path: Path) -> None:
    seed = seeded()
    rng = random.Random(seed)
    path = book(tmp_path / "a.epub", {"OEBPS/1.xhtml": page("<p>one &eacute; <b>two</b></p>" * 9)})
    raw = path.read_bytes()
    reasons = set()
    for _ in range(500):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 2, 5, 20])):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(raw), len(raw), rng.randrange(len(raw))])])
        try:
            text_of(path)
        except BadBook as e:
            reasons.add(str(e))
        except Exception as e:
            raise AssertionError(f"seed {seed}: {e!r}") from e
    assert {"a damaged EPUB", "not an EPUB"} <= reasons


def test_books_are_a_corpus_and_a_bad_one_costs_only_itself(tmp_path: Path) -> None:
    book(tmp_path / "b.epub", {"OEBPS/1.xhtml": page("<p>Call me Ishmael.</p>")})
    (tmp_path / "a.epub").write_text("bad")
    report = Report()
    found = list(documents(CorpusConfig(name="books", format=CorpusFormat.books, path=str(tmp_path)), report))
    assert [(d.id, d.text) for d in found] == [("b.epub", "Call me Ishmael.")]
    assert counts(report) == {"not an EPUB": 1}


def test_a_file_of_nothing_but_tags_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epub, "MAX_TAGS", 1000)
    assert (
        reason(book(tmp_path / "a.epub", {"OEBPS/1.xhtml": page("<b/>" * 1001)})) == "an EPUB that unpacks to too much"
    )

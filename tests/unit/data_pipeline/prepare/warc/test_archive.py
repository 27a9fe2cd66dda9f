"""Web archives of every kind: each record is accounted for, whatever is wrong with the archive."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from random import Random

import pytest

from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.read import Input
from data_pipeline.prepare.recipe_config import LimitsConfig
from data_pipeline.prepare.warc.charset import decode
from tests.helpers.archives import (
    KINDS,
    SINGLE,
    Made,
    by_length,
    frame,
    members,
    plain_items,
    put,
    read_all,
    some,
    squeeze,
)
from tests.helpers.seeds import seeded


def archive(folder: Path, kind: str, made: list[Made]) -> Input:
    ending, pack = KINDS[kind]
    return put(folder / f"a.{ending}", b"".join(pack(made)))


def same(item: Document | Dropped, made: Made, kind: str) -> bool:
    if made.type != "response":
        return isinstance(item, Dropped) and item.reason == (
            "not an HTTP response" if "arc" in kind else "a request record"
        )
    return isinstance(item, Document) and item.metadata["html"] == made.body and item.metadata["url"] == made.url


@pytest.mark.parametrize("kind", KINDS)
def test_every_record_comes_in_order_with_what_is_known_of_it(kind: str, tmp_path: Path) -> None:
    seed = seeded()
    made = some(Random(seed), 30)
    found = plain_items(archive(tmp_path, kind, made))
    assert len(found) == 30, seed
    assert all(same(item, m, kind) for item, m in zip(found, made, strict=True)), seed
    paths = [item.metadata["path"] if isinstance(item, Document) else item.path for item in found]
    assert len(set(paths)) == 30 and all(path.startswith("a.") for path in paths)
    for item, m in zip(found, made, strict=True):
        if isinstance(item, Document):
            assert item.id == (item.metadata["path"] if "arc" in kind else m.id)
            assert item.metadata["date"] == ("2008-04-30T20:48:25Z" if "arc" in kind else "2024-05-17T23:31:22Z")
            assert (item.text, item.metadata["source"], item.metadata["charset"]) == ("", "test", "UTF-8")


@pytest.mark.parametrize("kind", KINDS)
def test_long_records_come_whole_too(kind: str, tmp_path: Path) -> None:
    rng = Random(9)
    made = []
    for i in range(9):
        body = b"<html>" + rng.randbytes(rng.randrange(1000, 400_000)).hex().encode()
        made.append(Made(body, id=f"urn:uuid:{i}", url=f"http://example.org/{i}"))
    whole = read_all(archive(tmp_path, kind, made))
    assert len(whole) == 9 and all(same(item, m, kind) for (item, _), m in zip(whole, made, strict=True))
    for i in (0, 5):
        assert read_all(archive(tmp_path, kind, made), start=whole[i][1]) == whole[i + 1 :]


def test_arc_files_of_both_versions_and_their_other_records(tmp_path: Path) -> None:
    page = Made(b"<html>in a page").http()
    info = b"1 0 InternetArchive\nURL IP-address Archive-date Content-type Archive-length\n"
    parts = [
        b"filedesc://a.arc 0.0.0.0 20080430204825 text/plain %d\n%s\n" % (len(info), info),
        b"dns:example.org 192.0.2.1 20080430204825 text/dns 9\n2008 dns\n\n",
        b"http://example.org/a b 192.0.2.1 20080430204826 text/html 200 - - 0 a.arc %d\n%s\n" % (len(page), page),
        b"http://example.org/c 2001:db8::1 20080430204827 text/html %d\n%s\n" % (len(page), page),
    ]
    file = put(tmp_path / "a.arc", b"".join(parts))
    info_, dns, *pages = plain_items(file)
    at = len(parts[0])
    assert [info_, dns] == [Dropped("a warcinfo record", "a.arc:0"), Dropped("not an HTTP response", f"a.arc:{at}")]
    assert [p.metadata["url"] for p in pages if isinstance(p, Document)] == [
        "http://example.org/a b",
        "http://example.org/c",
    ]
    assert all(isinstance(p, Document) and p.metadata["html"] == b"<html>in a page" for p in pages) and resumes(file)


def resumes(file: Input, limits: LimitsConfig | None = None) -> bool:
    whole = read_all(file, limits)
    return all(read_all(file, limits, at) == whole[i:] for i, (_, at) in enumerate(whole, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_at_every_record(kind: str, tmp_path: Path) -> None:
    seed = seeded()
    assert resumes(archive(tmp_path, kind, some(Random(seed), 12))), seed


@pytest.mark.parametrize("kind", SINGLE)
def test_a_cut_anywhere_costs_only_the_record_in_which_it_is(kind: str, tmp_path: Path) -> None:
    made = some(Random(1), 3, 50)
    ending, pack = KINDS[kind]
    pieces = pack(made)
    data = b"".join(pieces)
    ends = [sum(map(len, pieces[: i + 1])) for i in range(3)]
    file = put(tmp_path / f"a.{ending}", data)
    for cut in range(len(data) - 1, 0, -1):
        os.truncate(file.path, cut)
        found = plain_items(Input(file.path, file.name, cut, 0))
        whole = sum(end <= cut for end in ends)
        assert all(same(item, m, kind) for item, m in zip(found[:whole], made, strict=False)), cut
        assert len(found) >= whole and len(found) <= whole + 1, cut
        for item in found[whole:]:  # without its last line end a record is whole
            lost = isinstance(item, Dropped) and item.reason in (
                "the archive is cut off",
                "not a web archive",
                NO_RECORD,
            )
            assert lost or same(item, made[whole], kind), (cut, item)


NO_RECORD = "no record begins where one should"


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_cost_only_near_records(kind: str, tmp_path: Path) -> None:
    """Flipped bytes cost their own record and the ones next to it, no other."""
    seed = seeded()
    rng = Random(seed)
    for _ in range(60):
        made = some(rng, 8)
        ending, pack = KINDS[kind]
        pieces = pack(made)
        hit = rng.randrange(len(pieces))
        at = rng.randrange(len(pieces[hit]))
        broken = bytearray(pieces[hit])
        broken[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        file = put(tmp_path / f"a.{ending}", b"".join([*pieces[:hit], broken, *pieces[hit + 1 :]]))
        items = plain_items(file)
        assert items and resumes(file), (seed, hit, at)
        if kind in SINGLE:
            came = {item.metadata.get("url"): item for item in items if isinstance(item, Document)}
            far = [m for i, m in enumerate(made) if abs(i - hit) > 1 and m.type == "response"]
            assert all(m.url in came and same(came[m.url], m, kind) for m in far), (seed, hit, at)


def with_lengths(kind: str, tmp_path: Path, said: int, which: int = 2) -> list[Document | Dropped]:
    made = some(Random(3), 6)
    made = [Made(m.body, id=m.id, url=m.url) for m in made]
    made[which] = Made(made[which].body, id="wrong", length=max(len(made[which].http()) + said, 0))
    found = plain_items(archive(tmp_path, kind, made))
    assert [item.id for item in found if isinstance(item, Document)] == [m.id for m in made if m.id != "wrong"]
    return [item for item in found if isinstance(item, Dropped)]


@pytest.mark.parametrize("kind", ["gzip", "plain", "zstd", "pairs", "one member", "blocks"])
@pytest.mark.parametrize("said", [-100000, -50, -3, 9, 50, 400, 90_000, 10**8, 10**14])
def test_a_wrong_length_costs_only_its_record(kind: str, said: int, tmp_path: Path) -> None:
    (dropped,) = with_lengths(kind, tmp_path, said)
    assert dropped.reason == "its length is wrong"


def test_a_length_that_is_no_number_costs_only_its_record(tmp_path: Path) -> None:
    made = some(Random(3), 3)
    data = [m.warc() for m in made]
    data[1] = data[1].replace(b"Content-Length: ", b"Content-Length: -")
    found = plain_items(put(tmp_path / "a.warc", b"".join(data)))
    assert same(found[0], made[0], "") and same(found[2], made[2], "") and len(found) == 3
    assert isinstance(found[1], Dropped) and found[1].reason == "its header cannot be read"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.warc.gz", b"%PDF-1.4\n" + bytes(9999), "not a web archive"),
        ("a.warc", b"%PDF-1.4\n" + bytes(9999), "not a web archive"),
        ("a.warc.zst", b"\0" * 70000, "not a web archive"),
        ("a.warc.gz", squeeze(b'{"a": 1}\n' * 9999), "not a web archive"),
        ("a.warc.gz", b"", "empty"),
        ("a.warc", b"\n\n", "empty"),
        ("a.warc.gz", squeeze(b""), "empty"),
    ],
)
def test_what_is_no_archive_is_one_drop(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    file = put(tmp_path / name, data)
    (item,) = plain_items(file)
    assert isinstance(item, Dropped) and item.reason == reason and resumes(file)


def test_a_file_that_is_gone_is_one_drop(tmp_path: Path) -> None:
    (item,) = plain_items(Input(tmp_path / "gone", "gone", 9, 0))
    assert item == Dropped("cannot be read (No such file or directory)", "gone")


def test_zeros_and_empty_members_between_records_are_nothing(tmp_path: Path) -> None:
    made = some(Random(5), 4)
    parts = [squeeze(made[0].warc()), bytes(1000), squeeze(made[1].warc()), squeeze(b""), squeeze(made[2].warc())]
    file = put(tmp_path / "a.warc.gz", b"".join([*parts, squeeze(b"\r\n\r\n"), squeeze(made[3].warc()), bytes(512)]))
    found = plain_items(file)
    assert len(found) == 4 and all(same(item, m, "") for item, m in zip(found, made, strict=True)) and resumes(file)


def test_junk_between_members_is_counted_and_passed(tmp_path: Path) -> None:
    made = some(Random(6), 3)
    junk = Random(7).randbytes(300_000)
    parts = [squeeze(made[0].warc()), junk, squeeze(made[1].warc()), squeeze(b"no record"), squeeze(made[2].warc())]
    file = put(tmp_path / "a.warc.gz", b"".join(parts))
    found = plain_items(file)
    assert [isinstance(item, Dropped) and item.reason for item in found[1::2]] == [
        "its compression is broken",
        NO_RECORD,
    ]
    assert all(same(item, m, "") for item, m in zip(found[::2], made, strict=True)) and resumes(file)


def test_zstd_archives_with_a_dictionary(tmp_path: Path) -> None:
    import zstandard

    made = some(Random(8), 300)
    samples = [m.warc() for m in made]
    words = zstandard.train_dictionary(4096, samples)
    packed = zstandard.ZstdCompressor(dict_data=words)
    body = b"".join(packed.compress(sample) for sample in samples)
    for held in (words.as_bytes(), frame(words.as_bytes())):
        first = b"\x5d\x2a\x4d\x18" + len(held).to_bytes(4, "little") + held
        file = put(tmp_path / "a.warc.zst", first + body)
        whole = read_all(file)
        assert all(same(item, m, "") for (item, _), m in zip(whole, made, strict=True))
        assert read_all(file, start=whole[100][1]) == whole[101:]


def meant(content: bytes) -> bytes:
    """What a server's answer means, by Python's own client; as it is where its header is of before it was archived."""

    class Socket:
        def makefile(self, _: str) -> io.BytesIO:
            return io.BytesIO(content)

    answer = HTTPResponse(Socket())  # type: ignore[arg-type]
    answer.begin()
    try:
        body = answer.read()
    except IncompleteRead:
        body = content.partition(b"\r\n\r\n")[2]
    return gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body


@pytest.mark.parametrize("name", ["commoncrawl-2020", "iana-2014", "archiveorg-2008", "wget-2024-ai2"])
def test_real_archives_give_what_other_readers_find(name: str, shared_data: Path) -> None:
    from fastwarc.warc import ArchiveIterator

    path = shared_data / "web" / "warc" / f"{name}.warc.gz"
    found = plain_items(Input(path, path.name, path.stat().st_size, 0))
    plain = by_length(members(path.read_bytes()))
    with path.open("rb") as raw:
        peer = [(r.record_id.strip("<>"), r.reader.read()) for r in ArchiveIterator(raw, parse_http=False)]
    assert [(header["warc-record-id"].strip("<>"), content) for header, content in plain] == peer
    pages = html = 0
    for item, (header, content) in zip(found, plain, strict=True):
        good = header["warc-type"] == "response" and re.match(rb"HTTP/1.[01] 200", content)
        head = content.partition(b"\r\n\r\n")[0].lower()
        html += bool(good and re.search(rb"\ncontent-type: *text/html", head) and meant(content).strip())
        if isinstance(item, Document):
            pages += "html" in item.metadata
            assert good and item.id == header["warc-record-id"].strip("<>")
            assert item.metadata["url"] == header["warc-target-uri"].strip("<>")
            body = meant(content)
            assert item.metadata.get("html", body) == body and decode(body, None) == (item.text or decode(body, None))
        else:
            kind = re.search(rb"\ncontent-type: *text/(html|plain)", head)
            assert not good or not kind or not meant(content).strip() or b"\0" in content, item
    assert pages == html > 0


def test_a_real_archive_that_is_clipped_is_said_to_be(shared_data: Path) -> None:
    path = shared_data / "web" / "warc" / "clipped.warc.gz"
    (item,) = plain_items(Input(path, path.name, path.stat().st_size, 0))
    assert item == Dropped("the archive is cut off", "clipped.warc.gz:0")


def test_texts_with_unix_line_ends_are_read_to_the_next_record(shared_data: Path) -> None:
    """Texts whose line ends were made Unix's, so that lengths are wrong, are read to the next record."""
    path = shared_data / "web" / "ccnet" / "sample.wet.txt"
    file = Input(path, path.name, path.stat().st_size, 0)
    _, *texts = plain_items(file)
    expected = [part.partition("\n\n")[2].strip("\n") for part in path.read_text("utf-8").split("WARC/1.0\n")[2:]]
    assert [item.text.strip("\n") for item in texts if isinstance(item, Document)] == expected
    assert len(expected) == 3 and resumes(file)


def test_damage_costs_no_record_before_it_in_its_member(tmp_path: Path) -> None:
    made = some(Random(seeded()), 60)
    packer = zlib.compressobj(wbits=31)
    good = packer.compress(b"".join(m.warc() for m in made)) + packer.flush(zlib.Z_FULL_FLUSH)
    found = plain_items(put(tmp_path / "a.warc.gz", good + b"\xff" * 20_000))  # a kind of block that there is not
    assert all(same(item, m, "gzip") for item, m in zip(found[:-1], made[:-1], strict=True))
    assert isinstance(found[-1], Dropped) and found[-1].reason == "its compression is broken"

"""What one record of a web archive may cost, and how its page comes out of the encodings of HTTP."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zlib
from pathlib import Path

import brotli
import pytest
import zstandard

from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.prepare.recipe_config import LimitsConfig
from data_pipeline.prepare.warc.charset import decode
from data_pipeline.prepare.warc.compression import START
from tests.helpers.archives import Made, frame, plain_items, put, read_all, squeeze

PAGE = "<html><body>" + "".join(f"<p>Página {i}</p>" for i in range(500)) + "</body></html>"
HTML = "Content-Type: text/html"


def one(tmp_path: Path, made: Made, limits: LimitsConfig | None = None) -> Document | Dropped:
    (item,) = plain_items(put(tmp_path / "a.warc.gz", squeeze(made.warc())), limits)
    return item


def chunked(body: bytes, step: int = 700) -> bytes:
    parts = [body[i : i + step] for i in range(0, len(body), step)]
    return b"".join(b"%x;name=value\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


ENCODED = {
    "gzip": squeeze,
    "x-gzip": squeeze,
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "br": brotli.compress,
    "zstd": zstandard.compress,
    "gzip, br": lambda body: brotli.compress(squeeze(body)),
    "identity": lambda body: body,
}


@pytest.mark.parametrize("coding", ENCODED)
@pytest.mark.parametrize("cut", [False, True])
def test_a_page_comes_out_of_its_encodings(coding: str, cut: bool, tmp_path: Path) -> None:
    body = ENCODED[coding](PAGE.encode())
    head = [HTML, f"Content-Encoding: {coding}", *["Transfer-Encoding: chunked"] * cut]
    item = one(tmp_path, Made(chunked(body) if cut else body, head=head))
    assert isinstance(item, Document) and item.metadata["html"] == PAGE.encode()


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "x-no-such"])
def test_an_encoding_that_the_archive_has_undone_is_left(coding: str, tmp_path: Path) -> None:
    head = [HTML, f"Content-Encoding: {coding}", "Transfer-Encoding: chunked"]
    item = one(tmp_path, Made(PAGE.encode(), head=head))
    assert isinstance(item, Document) and item.metadata["html"] == PAGE.encode()


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_a_page_whose_encoding_is_broken_is_dropped(coding: str, tmp_path: Path) -> None:
    body = ENCODED[coding](PAGE.encode())
    for broken in (body[: len(body) // 2], body[:20] + b"\xff" * 20 + body[40:]):
        item = one(tmp_path, Made(broken, head=[HTML, f"Content-Encoding: {coding}"]))
        assert isinstance(item, Dropped) and item.reason == "its Content-Encoding cannot be undone"


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_page_of_several_members_comes_whole(coding: str, tmp_path: Path) -> None:
    pack = {"gzip": squeeze, "zstd": zstandard.compress}[coding]
    body = b"".join(pack(part) for part in (PAGE[:50].encode(), PAGE[50:90].encode(), PAGE[90:].encode()))
    head = [HTML, f"Content-Encoding: {coding}"]
    for padding in (b"", bytes(3), b"\r\n"):
        item = one(tmp_path, Made(body + padding, head=head))
        assert isinstance(item, Document) and item.metadata["html"] == PAGE.encode()
    item = one(tmp_path, Made(body + b"rubbish", head=head))
    assert isinstance(item, Dropped) and item.reason == "bytes of another kind follow its Content-Encoding's end"
    item = one(tmp_path, Made(body[:-9], head=head))
    assert isinstance(item, Dropped) and item.reason == "its Content-Encoding cannot be undone"


DROPPED = {
    "an HTTP status other than 200": Made(b"<html>gone", status=404),
    "neither HTML nor plain text": Made(b"<html>", head=["Content-Type: image/png"]),
    "empty": Made(b" \r\n"),
    "not an HTTP response": Made(b"", type="resource", url="http://x.org/"),
    "a revisit record": Made(b"", type="revisit"),
    "a warcinfo record": Made(b"a: b", type="warcinfo"),
    "a continuation record": Made(b"x", type="continuation"),
    "a record of another type": Made(b"x", type="no such type"),
    "a file not of the web": Made(b"<html>", type="resource", url="metadata://gnu.org/", extra=[HTML]),
}
DROPPED["not an HTTP response"] = Made(b"20080430 dns", type="response", url="dns:x.org")


@pytest.mark.parametrize("reason", DROPPED)
def test_each_record_that_is_no_page_says_why(reason: str, tmp_path: Path) -> None:
    data = DROPPED[reason].warc()
    if "dns" in DROPPED[reason].url:
        data = data.replace(b"HTTP/1.1 200", b"HTTQ/1.1 200")
    (item,) = plain_items(put(tmp_path / "a.warc", data))
    assert item == Dropped(reason, "a.warc:0")


@pytest.mark.parametrize("body", [b"%PDF-1.7 <p>", b"\x89PNG\r\n\x1a\n<p>", b"\1\2\0\0\0", b"PK\3\4<html>"])
def test_a_file_that_only_says_it_is_html_is_dropped(body: bytes, tmp_path: Path) -> None:
    item = one(tmp_path, Made(body))
    assert isinstance(item, Dropped) and item.reason == "neither HTML nor plain text"


@pytest.mark.parametrize("page", [b"<p>text" + bytes(3000), bytes(3000) + b"<html>text", b"<p>te\0xt"])
def test_a_page_with_zeros_is_a_page(page: bytes, tmp_path: Path) -> None:
    item = one(tmp_path, Made(page))
    assert isinstance(item, Document) and decode(item.metadata["html"], None).endswith("text")


def test_pages_are_known_by_type_or_by_sight(tmp_path: Path) -> None:
    for head, body in [
        ("Content-Type: application/xhtml+xml", "<x/>"),
        ("Content-Type: TEXT/HTML;charset=x", "plain"),
        ("X: y", "<!DOCTYPE html>"),
        ("Content-Type: text/plain", " <html>"),
    ]:
        item = one(tmp_path, Made(body.encode(), head=[head]))
        assert isinstance(item, Document) and item.metadata["html"] == body.encode()
    item = one(tmp_path, Made("1 < 2, señor".encode("latin-1"), head=["Content-Type: text/plain; charset='latin1'"]))
    assert isinstance(item, Document) and item.text == "1 < 2, señor" and "html" not in item.metadata
    item = one(tmp_path, Made(b"what is it?", head=["X: y"]))
    assert isinstance(item, Dropped) and item.reason == "neither HTML nor plain text"
    item = one(tmp_path, Made(PAGE.encode("utf-16"), head=[HTML]))
    assert isinstance(item, Document) and item.metadata["html"] == PAGE.encode("utf-16")
    item = one(tmp_path, Made(PAGE.encode(), type="resource", extra=[HTML]))
    assert isinstance(item, Document) and item.metadata["html"] == PAGE.encode()


def test_texts_of_wet_archives_are_decoded_and_repaired(tmp_path: Path) -> None:
    item = one(tmp_path, Made("Una página válida está aquí ".encode() + b"\xff\xfe", type="conversion"))
    assert isinstance(item, Document)
    assert item.text == "Una página válida está aquí " + "\N{REPLACEMENT CHARACTER}" * 2 and "html" not in item.metadata


LIMITS = LimitsConfig(page_mib=2, ratio=200)
NOISE = b"<html>" + bytes(range(256)) * 40


def neighbours(folder: Path, middle: bytes, ending: str = "warc.gz", limits: LimitsConfig = LIMITS) -> str:
    """Why the record between two good ones is dropped."""
    pack = frame if ending.endswith("zst") else squeeze if ending.endswith("gz") else bytes
    good = [Made(PAGE.encode(), id=name).warc() for name in ("first", "last")]
    file = put(folder / f"a.{ending}", pack(good[0]) + middle + pack(good[1]))
    whole = read_all(file, limits)
    (first, _), (item, at), (last, _) = whole
    assert isinstance(first, Document) and first.id == "first" and isinstance(last, Document) and last.id == "last"
    assert read_all(file, limits, at) == whole[2:] and isinstance(item, Dropped)
    return item.reason


TOO_LARGE, BOMB = "it is larger than limits.page_mib", "it expands beyond limits.ratio"
NO_RECORD = "no record begins where one should"


def test_limits_hold_where_they_should(tmp_path: Path) -> None:
    exact = Made(b"<html>" + b"a b" * 100, head=[HTML])
    size = len(exact.http()) / 2**20
    assert isinstance(one(tmp_path, exact, LimitsConfig(page_mib=size + 1e-9)), Document)
    item = one(tmp_path, exact, LimitsConfig(page_mib=size - 2e-6))
    assert isinstance(item, Dropped) and item.reason == TOO_LARGE
    zeros = Made(b"<html>" + b" " * 1_000_000)  # of less than a MiB the ratio does not matter
    assert isinstance(one(tmp_path, zeros), Document)


@pytest.mark.parametrize("ending", ["warc", "warc.gz", "warc.zst"])
def test_a_page_that_is_too_large_costs_only_itself(ending: str, tmp_path: Path) -> None:
    import secrets

    body = secrets.token_hex(3 << 20).encode()
    pack = frame if ending.endswith("zst") else squeeze if ending.endswith("gz") else bytes
    assert neighbours(tmp_path, pack(Made(body).warc()), ending) == TOO_LARGE


@pytest.mark.parametrize("ending", ["warc.gz", "warc.zst"])
@pytest.mark.parametrize("mib", [1.5, 40])
def test_a_bomb_costs_only_itself(ending: str, mib: float, tmp_path: Path) -> None:
    pack = frame if ending.endswith("zst") else squeeze
    assert neighbours(tmp_path, pack(Made(bytes(int(mib * 2**20))).warc()), ending) == BOMB
    assert neighbours(tmp_path, pack(bytes(int(mib * 2**20))), ending) in (BOMB, NO_RECORD)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_a_bomb_in_a_content_encoding_costs_only_itself(coding: str, tmp_path: Path) -> None:
    pack = ENCODED.get(coding, lambda body: squeeze(squeeze(body)))
    bomb = Made(pack(b"<html>" + b" " * (40 << 20)), head=[HTML, f"Content-Encoding: {coding}"])
    assert neighbours(tmp_path, squeeze(bomb.warc())) in (BOMB, TOO_LARGE)


def test_headers_that_never_end_cost_only_themselves(tmp_path: Path) -> None:
    endless = b"WARC/1.0\r\n" + b"X: y\r\n" * 300_000
    assert neighbours(tmp_path, squeeze(endless)) in ("its header cannot be read", BOMB)
    assert neighbours(tmp_path, squeeze(b"\r\n" * 300_000)) == NO_RECORD


MEASURE = """
import json, sys
from pathlib import Path
from data_pipeline.prepare.warc.archive import read
from data_pipeline.corpus.read import Input
from data_pipeline.prepare.recipe_config import LimitsConfig
import brotli, zstandard
from tests.benchmarks.machine import resident_mib
before = resident_mib()[1]
path = Path(sys.argv[1])
items = [item for item, _ in read(Input(path, path.name, path.stat().st_size, 0), LimitsConfig(), "test")]
reasons = [getattr(item, "reason", item.id if hasattr(item, "id") else "") for item in items]
print(json.dumps([reasons, resident_mib()[1] - before]))
"""


def zeros(gib: int) -> bytes:
    """A gzip member of that much, made of one of 64 MiB: its blocks are repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(64 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    head = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {gib << 30}\r\n\r\n".encode()
    begin = head.compress(start) + head.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(7) + begin + block * (gib * 16) + b"\x03\0" + bytes(8)


def test_memory_is_bounded_whatever_the_archive_holds(tmp_path: Path) -> None:
    def good(name: str) -> bytes:
        return squeeze(Made(PAGE.encode(), id=name).warc())

    large = gzip.compress(Made(b"<html>" + (bytes(range(1, 256)) * 99 + b"x") * 4150).warc(), 1)
    inner = Made(squeeze(bytes(256 << 20)), head=[HTML, "Content-Encoding: gzip"])
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join([good("1"), zeros(10), good("2"), large, good("3"), squeeze(inner.warc()), good("4")]))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reasons, mib = json.loads(done.stdout)
    assert (reasons[:3], reasons[4::2]) == (["1", BOMB, "2"], ["3", "4"])
    assert {reasons[3], reasons[5]} <= {BOMB, TOO_LARGE}
    assert 1 < mib < 120, f"{mib} MiB for pages of 16 MiB at most"


def test_a_search_for_arc_headers_takes_no_quadratic_time() -> None:
    """A line that repeats the look of an ARC header costs no quadratic time."""
    assert START.search(b"a:" + b" 1 12345678901234" * 40_000 + b" x") is None  # the test's time limit is the proof

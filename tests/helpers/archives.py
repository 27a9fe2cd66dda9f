"""Web archives written by hand, whole ones, and a plain reader of whole ones to compare with."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import zstandard

from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.read import Input
from data_pipeline.prepare.recipe_config import LimitsConfig
from data_pipeline.prepare.warc.archive import read

WORDS = [
    "the",
    "of",
    "archive",
    "página",
    "страница",
    "ページ",
    "crawl",
    "<b>bold</b>",
    "&amp;",
    "text\r\n\r\n",
    "WARC/1.0",
    "HTTP/1.1",
    "\n\n",
]


@dataclass(frozen=True)
class Made:
    """A record to write; `head` is the HTTP header but for the status line."""

    body: bytes
    type: str = "response"
    id: str = "urn:uuid:0"
    url: str = "http://example.org/"
    status: int = 200
    head: Sequence[str] = ("Content-Type: text/html; charset=UTF-8",)
    length: int | None = None  # of its header, if it is not the true one
    extra: Sequence[str] = field(default=())

    def http(self, line: str = "\r\n") -> bytes:
        lines = [f"HTTP/1.1 {self.status} Some reason", *self.head, "", ""]
        return line.join(lines).encode() + self.body if self.type == "response" else self.body

    def warc(self, line: str = "\r\n") -> bytes:
        content = self.http(line)
        lines = ["WARC/1.0", f"WARC-Type: {self.type}", f"WARC-Record-ID: <{self.id}>", f"WARC-Target-URI: {self.url}"]
        lines += ["WARC-Date: 2024-05-17T23:31:22Z", *self.extra]
        lines += [f"Content-Length: {len(content) if self.length is None else self.length}", "", ""]
        return line.join(lines).encode() + content + line.encode() * 2

    def arc(self) -> bytes:
        content = self.http()
        length = len(content) if self.length is None else self.length
        return f"{self.url} 192.0.2.1 20080430204825 text/html {length}\n".encode() + content + b"\n"


def squeeze(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def blocks(parts: Sequence[bytes], pack: Callable[[bytes], bytes]) -> list[bytes]:
    """Members of 777 bytes, but for cuts at which a body seems to begin a record: no reader could tell that."""
    whole, members, start = b"".join(parts), [], 0
    while start < len(whole):
        end = start + 777
        while whole[end : end + 5] == b"WARC/":
            end += 1
        members.append(pack(whole[start:end]))
        start = end
    return members


KINDS: dict[str, tuple[str, Callable[[Sequence[Made]], list[bytes]]]] = {
    "gzip": ("warc.gz", lambda made: [squeeze(m.warc()) for m in made]),
    "plain": ("warc", lambda made: [m.warc() for m in made]),
    "zstd": ("warc.zst", lambda made: [frame(m.warc()) for m in made]),
    "lf": ("warc", lambda made: [m.warc("\n") for m in made]),
    "lf gzip": ("warc.gz", lambda made: [squeeze(m.warc("\n")) for m in made]),
    "arc": ("arc", lambda made: [m.arc() for m in made]),
    "arc gzip": ("arc.gz", lambda made: [squeeze(m.arc()) for m in made]),
    "one member": ("warc.gz", lambda made: [squeeze(b"".join(m.warc() for m in made))]),
    "one frame": ("warc.zst", lambda made: [frame(b"".join(m.warc() for m in made))]),
    "blocks": ("warc.gz", lambda made: blocks([m.warc() for m in made], squeeze)),
    "pairs": (
        "warc.gz",
        lambda made: [squeeze(b"".join(m.warc() for m in made[i : i + 2])) for i in range(0, len(made), 2)],
    ),
}
"""By name: how the file's name ends, and its pieces, one for each record in the first seven."""

SINGLE = list(KINDS)[:7]


def some(rng: Random, count: int, words: int = 200) -> list[Made]:
    """Pages, and requests among them, with bodies that look a little like records themselves."""
    made = []
    for i in range(count):
        body = "<html>" + " ".join(rng.choices(WORDS, k=rng.randrange(1, words)))
        kind = "request" if rng.random() < 0.2 else "response"
        made.append(Made(body.encode(), kind, f"urn:uuid:{i}", f"http://example.org/{i}"))
    return made


def put(path: Path, data: bytes) -> Input:
    path.write_bytes(data)
    return Input(path, path.name, len(data), 0)


def read_all(file: Input, limits: LimitsConfig | None = None, start: int = 0) -> list[tuple[Document | Dropped, int]]:
    return list(read(file, limits or LimitsConfig(), "test", start))


def plain_items(file: Input, limits: LimitsConfig | None = None) -> list[Document | Dropped]:
    return [item for item, _ in read_all(file, limits)]


def members(data: bytes) -> bytes:
    """All of a gzip file, decompressed."""
    parts = []
    while data:
        unzip = zlib.decompressobj(31)
        parts.append(unzip.decompress(data))
        data = unzip.unused_data
    return b"".join(parts)


def by_length(data: bytes) -> list[tuple[dict[str, str], bytes]]:
    """(header, content) of each record of a whole WARC file."""
    records, start = [], 0
    while start < len(data):
        end = data.index(b"\r\n\r\n", start)
        header = {k.lower(): v.strip() for k, v in re.findall(r"(?m)^([^:\r\n]+):(.*)$", data[start:end].decode())}
        size = int(header["content-length"])
        records.append((header, data[end + 4 : end + 4 + size]))
        start = end + 4 + size
        assert data[start : start + 4] == b"\r\n\r\n"
        start += 4
    return records

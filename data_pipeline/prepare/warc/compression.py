"""A web archive's bytes, decompressed a few at a time: members (gzip) or frames (zstd), and gaps for what is damaged.

An archive is a row of members; as a rule each holds a record, but it may hold many, or a part of one. `pieces(start)`
gives them in order: a `Member` before its first bytes, a `Gap` for lost bytes. The same `start` gives the same pieces.
After a gap it goes on at the next member that begins with a record.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

START_OF_RECORD = (
    rb"WARC/\d\.\d+[ \t]*\r?\n"  # ISO 28500
    # ARC: URL, address, date, type, ..., length; bounded, so that no line is searched again and again
    rb"|[a-z][a-z0-9+.-]*:[^\r\n]{0,2100} [0-9a-f.:]{1,45} \d{14} [^\r\n]{0,1024}\d\r?\n"
)
START = re.compile(START_OF_RECORD, re.IGNORECASE)
LINE = 1 << 13  # bytes at most of an ARC header
PIECE = 1 << 16  # bytes that are inflated at a time
LOOKBACK = 1 << 17  # bytes of the file: damaged gzip may have been read past its end by that much
BLOCK = 1 << 18  # deflate's and zstd's blocks are shorter
GZIP, ZSTD, SKIPPABLE = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
DICTIONARY = b"\x5d" + SKIPPABLE  # in a frame before all others (IIPC's WARC/zstd)
MAX_DICTIONARY = 1 << 24  # bytes
CUT_OFF, BROKEN = "the archive is cut off", "its compression is broken"


@dataclass(frozen=True, slots=True)
class Member:
    offset: int  # in the file
    opens: bool  # with a record's start, so that the record before has ended


@dataclass(frozen=True, slots=True)
class Gap:
    reason: str


@dataclass(frozen=True, slots=True)
class Piece:
    data: bytes
    spent: int  # the file has been used up to this byte


class Plain:
    """An archive that is not compressed: one member, which can be read from any byte."""

    zipped = False

    def __init__(self, raw: IO[bytes], size: int) -> None:
        self.raw = raw
        self.size = size

    def pieces(self, start: int) -> Iterator[Member | Gap | Piece]:
        self.raw.seek(start)
        yield Member(start, False)
        while data := self.raw.read(PIECE):
            start += len(data)
            yield Piece(data, start)

    def find(self, start: int) -> int:
        return start


class Zipped:
    """Members (gzip) or frames (zstd).

    Args:
        magic: the first bytes of a member.
        inflater: makes a zlib.decompressobj, or zstandard's.
        limit: the arguments of its `decompress` after the data: zlib's max_length.
        damage: what it raises for broken data.
        step: bytes of the file that are inflated at a time.
    """

    zipped = True

    def __init__(
        self,
        raw: IO[bytes],
        size: int,
        magic: bytes,
        inflater: Callable[[], Any],
        limit: tuple[int, ...],
        damage: type[Exception],
        step: int,
    ) -> None:
        self.raw = raw
        self.size = size
        self.magic = magic
        self.inflater = inflater
        self.limit = limit
        self.damage = damage
        self.step = step
        self.spent = 0
        self.end = 0  # of the member that was inflated last

    def pieces(self, start: int) -> Iterator[Member | Gap | Piece]:
        while start < self.size:
            head, opened, fault = b"", False, None
            try:
                for data in self._salvaged(start):
                    if opened:
                        yield Piece(data, self.spent)
                    elif len(head := head + data) >= LINE:
                        yield Member(start, bool(START.match(head)))
                        yield Piece(head, self.spent)
                        opened = True
            except EOFError:
                fault = CUT_OFF
            except self.damage:
                fault = BROKEN
            if not opened and (head or fault):  # an empty one is nothing to remember
                yield Member(start, bool(START.match(head)))
                yield Piece(head, self.spent)
            if fault:
                yield Gap(fault)
            start = self.find(max(start + 1, self.spent - LOOKBACK)) if fault else self._past_zeros(self.end)
        yield Member(self.size, False)

    def _salvaged(self, start: int) -> Iterator[bytes]:
        """inflate(start), with the bytes before the damage that a decompressor keeps when it fails."""
        given = 0
        try:
            for data in self.inflate(start):
                given += len(data)
                yield data
        except self.damage:
            with suppress(EOFError, self.damage):
                for data in self.inflate(start, self.raw.tell() - self.step):
                    if given < len(data):
                        yield data[given:]
                    given = max(0, given - len(data))
            raise

    def inflate(self, start: int, slow: int | None = None) -> Iterator[bytes]:
        """The bytes of the member at `start`, from the position `slow` on byte by byte of the file; sets `end`.

        Raises:
            EOFError: the file ends before it.
            self.damage: it is broken.
        """
        inflater, fed, self.spent = self.inflater(), start, start
        while not inflater.eof:
            data = inflater.unconsumed_tail
            if not data:
                data = self._read(fed, self.step if slow is None or fed < slow else 1)
                fed += len(data)
            piece = inflater.decompress(data, *self.limit)
            self.spent = fed - len(inflater.unconsumed_tail) - len(inflater.unused_data)
            if piece:
                yield piece
            elif not data and not inflater.eof:
                raise EOFError
        self.end = fed - len(inflater.unused_data)

    def find(self, start: int) -> int:
        """The offset, from `start` on, of a member that begins with a record; or the end of the file."""
        while block := self._read(start, BLOCK):
            hit = block.find(self.magic)
            while hit >= 0:
                if self._opens(start + hit):
                    return start + hit
                hit = block.find(self.magic, hit + 1)
            start += max(len(block) - len(self.magic) + 1, 1)
        return self.size

    def _opens(self, start: int) -> bool:
        head = b""
        with suppress(EOFError, self.damage):
            for data in self.inflate(start):
                head += data
                if len(head) >= LINE or self.spent - start > BLOCK:
                    break
        return bool(START.match(head))

    def _past_zeros(self, start: int) -> int:
        """The first byte that is not 0: tapes are filled up with zeros."""
        while (block := self._read(start, BLOCK)).startswith(b"\0"):
            start += len(block) - len(block.lstrip(b"\0"))
        return start

    def _read(self, start: int, size: int) -> bytes:
        self.raw.seek(start)
        return self.raw.read(size)


def open_members(raw: IO[bytes], name: str, size: int) -> Plain | Zipped:
    """The reader that fits the first bytes; if they say nothing, the name."""
    head = raw.read(LINE)
    magic = head[:4]
    if magic.startswith(GZIP[:2]):
        return gzip_members(raw, size)
    if magic == ZSTD or magic[1:] == SKIPPABLE:
        return zstd_members(raw, size)
    kinds: dict[str, Callable[[IO[bytes], int], Plain | Zipped]] = {"gz": gzip_members, "zst": zstd_members}
    return Plain(raw, size) if START.match(head) else kinds.get(name.rpartition(".")[2], Plain)(raw, size)


def gzip_members(raw: IO[bytes], size: int) -> Zipped:
    return Zipped(raw, size, GZIP, lambda: zlib.decompressobj(31), (PIECE,), zlib.error, 1 << 14)


def zstd_members(raw: IO[bytes], size: int) -> Zipped:
    """zstandard has no max_length: what it gives for `step` bytes is bounded by these."""
    import zstandard

    raw.seek(0)
    dictionary = None
    if raw.read(4) == DICTIONARY:
        words = raw.read(min(int.from_bytes(raw.read(4), "little"), MAX_DICTIONARY))
        with suppress(zstandard.ZstdError):  # frames that need it will say so
            if words.startswith(ZSTD):
                unzip = zstandard.ZstdDecompressor(max_window_size=MAX_DICTIONARY)
                words = unzip.stream_reader(words).read(MAX_DICTIONARY)
            dictionary = zstandard.ZstdCompressionDict(words)
    unzip = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 27)  # as the zstd program's own limit
    step = 1 << 9  # 4 bytes can hold a block of 128 KiB: no piece is more than 16 MiB
    return Zipped(raw, size, ZSTD, unzip.decompressobj, (), zstandard.ZstdError, step)

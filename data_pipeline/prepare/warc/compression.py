"""A web archive's bytes, decompressed a few at a time: members (gzip) or frames (zstd), and what is damaged.

An archive is a row of members; each holds a record, as a rule, but may hold many, or a piece of one. `pieces(at)` tells
of them in order: a `Member` before its first bytes, a `Gap` where bytes are lost. The same `at` gives the same pieces.
After a gap it goes on at the next member in which a record begins.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Protocol

START_OF_RECORD = (
    rb"WARC/\d\.\d+[ \t]*\r?\n"  # ISO 28500
    # ARC: URL, address, date, type, ..., length; bounded, so that no line is looked at again and again
    rb"|[a-z][a-z0-9+.-]*:[^\r\n]{0,2100} [0-9a-f.:]{1,45} \d{14} [^\r\n]{0,1024}\d\r?\n"
)
START = re.compile(START_OF_RECORD, re.IGNORECASE)
LINE = 1 << 13  # bytes at most of an ARC header
PIECE = 1 << 16  # bytes that are inflated at a time
LOOKBACK = 1 << 17  # bytes of the file: damaged gzip may have been read past its end by that much
BLOCK = 1 << 18  # deflate's and zstd's blocks are shorter
GZIP, ZSTD, SKIPPABLE = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
DICTIONARY = b"\x5d" + SKIPPABLE  # in a frame before all others (IIPC's WARC/zstd)
CUT_OFF, BROKEN = "the archive is cut off", "its compression is broken"


@dataclass(frozen=True, slots=True)
class Member:
    offset: int  # in the file
    opens: bool  # with a record's start: whatever came before has ended


@dataclass(frozen=True, slots=True)
class Gap:
    reason: str


@dataclass(frozen=True, slots=True)
class Piece:
    data: bytes
    spent: int  # the file has been used up to here


class Inflater(Protocol):
    """As zlib.decompressobj."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class Plain:
    """An archive that is not compressed: one member, of which any byte can be reached."""

    zipped = False

    def __init__(self, raw: IO[bytes], size: int) -> None:
        self.raw, self.size = raw, size

    def pieces(self, at: int) -> Iterator[Member | Gap | Piece]:
        self.raw.seek(at)
        yield Member(at, False)
        while data := self.raw.read(PIECE):
            at += len(data)
            yield Piece(data, at)

    def find(self, at: int) -> int:
        return at


class Zipped:
    """Members (gzip) or frames (zstd); `step` bytes of the file are inflated at a time."""

    zipped = True

    def __init__(
        self,
        raw: IO[bytes],
        size: int,
        magic: bytes,
        inflater: Callable[[], Inflater],
        damage: type[Exception],
        step: int,
    ) -> None:
        self.raw, self.size, self.magic = raw, size, magic
        self.inflater, self.damage, self.step = inflater, damage, step
        self.spent = self.end = 0

    def pieces(self, at: int) -> Iterator[Member | Gap | Piece]:
        while at < self.size:
            head, opened, fault = b"", False, None
            try:
                for data in self._inflate(at):
                    if opened:
                        yield Piece(data, self.spent)
                    elif len(head := head + data) >= LINE:
                        yield Member(at, bool(START.match(head)))
                        yield Piece(head, self.spent)
                        opened = True
            except EOFError:
                fault = CUT_OFF
            except self.damage:
                fault = BROKEN
            if not opened and (head or fault):  # an empty one is nothing to remember
                yield Member(at, bool(START.match(head)))
                yield Piece(head, self.spent)
            if fault:
                yield Gap(fault)
            at = self.find(max(at + 1, self.spent - LOOKBACK)) if fault else self._past_zeros(self.end)
        yield Member(self.size, False)

    def _inflate(self, at: int) -> Iterator[bytes]:
        """The bytes of the member at `at`; leaves where it ends.

        Raises:
            EOFError: the file ends before it.
            self.damage: it is broken.
        """
        inflater, fed, self.spent = self.inflater(), at, at
        while not inflater.eof:
            data = inflater.unconsumed_tail
            if not data:
                data = self._read(fed, self.step)
                fed += len(data)
            found = inflater.decompress(data, PIECE)
            self.spent = fed - len(inflater.unconsumed_tail) - len(inflater.unused_data)
            if found:
                yield found
            elif not data and not inflater.eof:
                raise EOFError
        self.end = fed - len(inflater.unused_data)

    def find(self, at: int) -> int:
        """Where, from `at` on, a member begins that begins with a record; or the end of the file."""
        while block := self._read(at, BLOCK):
            hit = block.find(self.magic)
            while hit >= 0:
                if self._opens(at + hit):
                    return at + hit
                hit = block.find(self.magic, hit + 1)
            at += max(len(block) - len(self.magic) + 1, 1)
        return self.size

    def _opens(self, at: int) -> bool:
        head = b""
        try:
            for data in self._inflate(at):
                head += data
                if len(head) >= LINE or self.spent - at > BLOCK:
                    break
        except (EOFError, self.damage):
            pass
        return bool(START.match(head))

    def _past_zeros(self, at: int) -> int:
        """Tapes are filled up with them."""
        while (block := self._read(at, BLOCK)).startswith(b"\0"):
            at += len(block) - len(block.lstrip(b"\0"))
        return at

    def _read(self, at: int, size: int) -> bytes:
        self.raw.seek(at)
        return self.raw.read(size)


def members(raw: IO[bytes], name: str, size: int) -> Plain | Zipped:
    """By its first bytes; where these say nothing, by its name."""
    head = raw.read(LINE)
    magic = head[:4]
    if magic.startswith(GZIP[:2]):
        return _gzip(raw, size)
    if magic == ZSTD or magic[1:] == SKIPPABLE:
        return _zstd(raw, size)
    kinds: dict[str, Callable[[IO[bytes], int], Plain | Zipped]] = {"gz": _gzip, "zst": _zstd}
    return Plain(raw, size) if START.match(head) else kinds.get(name.rpartition(".")[2], Plain)(raw, size)


def _gzip(raw: IO[bytes], size: int) -> Zipped:
    return Zipped(raw, size, GZIP, lambda: zlib.decompressobj(31), zlib.error, 1 << 14)


class _Frame:
    """zstandard's decompressobj as zlib's. It has no max_length: what it gives for `step` bytes is bounded by these."""

    unconsumed_tail = b""

    def __init__(self, unzip: object) -> None:
        self.unzip = unzip.decompressobj()  # type: ignore[attr-defined]

    @property
    def eof(self) -> bool:
        return self.unzip.eof

    @property
    def unused_data(self) -> bytes:
        return self.unzip.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self.unzip.decompress(data)


def _zstd(raw: IO[bytes], size: int) -> Zipped:
    import zstandard

    raw.seek(0)
    known, most = None, 1 << 24
    if raw.read(4) == DICTIONARY:
        words = raw.read(min(int.from_bytes(raw.read(4), "little"), most))
        with suppress(zstandard.ZstdError):  # frames that need it will say so
            if words.startswith(ZSTD):
                words = zstandard.ZstdDecompressor(max_window_size=most).stream_reader(words).read(most)
            known = zstandard.ZstdCompressionDict(words)
    unzip = zstandard.ZstdDecompressor(dict_data=known, max_window_size=1 << 27)  # as the zstd program's own limit
    step = 1 << 9  # 4 bytes can hold a block of 128 KiB: no piece is more than 16 MiB
    return Zipped(raw, size, ZSTD, lambda: _Frame(unzip), zstandard.ZstdError, step)

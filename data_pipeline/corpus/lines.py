"""The decompressed bytes of a file, and its lines, in bounded memory whatever the file holds.

A compressed file is a row of members (gzip), frames (zstd) or streams (bzip2, xz). All are read. A damaged file gives
every byte before the damage: a decompressor that fails keeps some, so they are decompressed once more, byte by byte.
"""

from __future__ import annotations

import bz2
import lzma
import re
import string
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from conf.errors import UserError
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import Input

ZSTD_WINDOW = 1 << 27  # bytes of memory that a .zst file may ask for: the zstd program's own limit
XZ_MEMORY = 1 << 30  # the same of a .xz file
_STEP = 1 << 16  # bytes
_PADDING = bytes(1) + string.whitespace.encode()
_HEAD = 1 << 10  # bytes, among which another member is looked for


class Damaged(OSError):
    """A compressed file that is cut off, broken, or asks for too much memory; the message says which."""


class TrailingBytes(Damaged):
    """The members are whole, and bytes that begin no other one follow them."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression: how its members begin and are decompressed.

    `step` bytes of a file give about 16 MiB at most, or else `limit` bounds the bytes that one call gives.
    """

    magic: re.Pattern[bytes]  # of each member
    start: Callable[[], Any]  # makes the decompressor of one member
    damage: type[Exception]
    step: int
    limit: tuple[int, ...] = ()


ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # of a frame, or of one to skip
GZIP = Codec(re.compile(rb"\x1f\x8b\x08"), partial(zlib.decompressobj, 31), zlib.error, 1 << 14)


def zstd(window: int = ZSTD_WINDOW) -> Codec:
    """zstd of frames that ask for at most `window` bytes of memory."""
    try:
        import zstandard
    except ImportError:
        raise UserError("a .zst file needs the zstandard package: pip install 'gradus[data]'") from None
    start = zstandard.ZstdDecompressor(max_window_size=window).decompressobj
    return Codec(ZSTD_MAGIC, start, zstandard.ZstdError, 1 << 9)  # 4 bytes can hold a block of 128 KiB


BZIP2 = Codec(re.compile(rb"BZh[1-9][1\x17]"), bz2.BZ2Decompressor, OSError, _STEP, (_STEP,))
XZ = Codec(
    re.compile(rb"\xfd7zXZ"),
    partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, XZ_MEMORY),
    lzma.LZMAError,
    _STEP,
    (_STEP,),
)


def codec_of(name: str, head: bytes = b"", window: int = ZSTD_WINDOW) -> Codec | None:
    """The compression of a file that begins with `head`; if that is of none, by the ending of its name; or None."""
    ending = name.rpartition(".")[2].lower()
    for known, magic in (("gz", GZIP.magic), ("zst", ZSTD_MAGIC), ("bz2", BZIP2.magic), ("xz", XZ.magic)):
        if magic.match(head):
            ending = known
    return zstd(window) if ending == "zst" else {"gz": GZIP, "bz2": BZIP2, "xz": XZ}.get(ending)


def lines(file: Input, longest: int, window: int = ZSTD_WINDOW) -> Iterator[tuple[bytes | Dropped, int]]:
    """Each line without its end, and the position in the file on disk; a damaged file ends in a `Dropped`."""
    try:
        with file.path.open("rb") as raw:
            for line in _split(content(raw, file.name, window), longest):
                yield Dropped(f"a line longer than {longest:,} bytes", "") if line is None else line, raw.tell()
    except OSError as e:
        yield Dropped(f"the rest of the file cannot be read ({e.strerror or e})", ""), file.size


def _split(chunks: Iterator[bytes], longest: int) -> Iterator[bytes | None]:
    """Lines, or None for one longer than `longest`, which is read but never held."""
    held, too_long = bytearray(), False
    for chunk in chunks:
        piece, *rest = chunk.split(b"\n")
        held += piece
        for piece in rest:
            yield None if too_long or len(held) > longest else bytes(held)
            held, too_long = bytearray(piece), False
        if len(held) > longest:
            held, too_long = bytearray(), True
    if held or too_long:
        yield None if too_long else bytes(held)


def content(raw: IO[bytes], name: str, window: int = ZSTD_WINDOW) -> Iterator[bytes]:
    """The bytes of a file in small pieces, decompressed as its first bytes or the ending of its name say.

    Raises:
        Damaged: the file holds no more than what came.
    """
    head = raw.read(_HEAD)
    raw.seek(0)
    yield from chunks(raw, codec_of(name, head, window))


def chunks(raw: IO[bytes], codec: Codec | None) -> Iterator[bytes]:
    """The bytes of a file in small pieces, decompressed if a codec is given; raises as `content`."""
    if codec:
        yield from decompressed(raw, codec)
    else:
        while chunk := raw.read(_STEP):
            yield chunk


def decompressed(raw: IO[bytes], codec: Codec) -> Iterator[bytes]:
    """The bytes of all members of a file; zeros and white space may fill it up behind the last one.

    Raises:
        Damaged: a member is not whole; every byte that can be had came before.
    """
    if not raw.read(1):
        return
    end = yield from _member(raw, codec, 0)
    while data := _read(raw, end, _HEAD):
        if not (rest := data.lstrip(_PADDING)):
            end += len(data)
            continue
        end += len(data) - len(rest)
        if not codec.magic.match(_read(raw, end, _HEAD)):
            raise TrailingBytes("bytes of another kind follow its end")
        end = yield from _member(raw, codec, end)


def _member(raw: IO[bytes], codec: Codec, start: int) -> Generator[bytes, None, int]:
    """The bytes of the member at `start`; returns the position behind it."""
    given = end = 0
    try:
        for piece, position in _pieces(raw, codec, start):
            yield piece
            given, end = given + len(piece), position
    except codec.damage as e:
        with suppress(codec.damage, Damaged):
            for piece, _ in _pieces(raw, codec, start, raw.tell() - codec.step):
                yield piece[given:]
                given = max(0, given - len(piece))
        raise Damaged(str(e)) from None
    return end


def _pieces(raw: IO[bytes], codec: Codec, start: int, slow: int | None = None) -> Iterator[tuple[bytes, int]]:
    """The bytes of the member at `start`, each piece with the position to which the file is used up.

    From the position `slow` on, one byte of the file after the other is decompressed.
    """
    raw.seek(start)
    position, member = start, codec.start()
    while not member.eof:
        if not (data := raw.read(codec.step if slow is None or position < slow else 1)):
            raise Damaged("it is cut off")
        position += len(data)
        yield member.decompress(data, *codec.limit), position - len(member.unused_data)
        while not member.eof and not getattr(member, "needs_input", True):
            yield member.decompress(b"", *codec.limit), position - len(member.unused_data)


def _read(raw: IO[bytes], start: int, size: int) -> bytes:
    raw.seek(start)
    return raw.read(size)

"""The decompressed bytes of a file, and its lines, in bounded memory whatever the file holds."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from conf.errors import UserError
from data_pipeline.corpus.document import Dropped
from data_pipeline.corpus.inputs import Input

ZSTD_WINDOW = 1 << 27  # bytes of memory that a .zst file may ask for: the zstd program's own limit
XZ_MEMORY = 1 << 30  # the same of a .xz file
_STEP = 1 << 16  # bytes
_ZSTD_STEP = 1 << 9  # 4 bytes can hold a block of 128 KiB: no chunk is more than 16 MiB


def lines(file: Input, longest: int, window: int = ZSTD_WINDOW) -> Iterator[tuple[bytes | Dropped, int]]:
    """Each line without its end, and the position in the file on disk; a damaged file ends in a `Dropped`."""
    try:
        with file.path.open("rb") as raw:
            for line in _split(chunks(raw, file.name, window), longest):
                yield Dropped(f"a line longer than {longest:,} bytes", "") if line is None else line, raw.tell()
    except (OSError, EOFError, zlib.error) as e:
        yield Dropped(f"the rest of the file cannot be read ({getattr(e, 'strerror', None) or e})", ""), file.size


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


def chunks(raw: IO[bytes], name: str, window: int = ZSTD_WINDOW) -> Iterator[bytes]:
    """The bytes of a file in small pieces, decompressed as the ending of its name says.

    Raises:
        OSError, EOFError, zlib.error: it is damaged, cut off, or asks for too much memory.
    """
    if name.endswith(".zst"):
        yield from _zstd_chunks(raw, window)
    elif name.endswith(".xz"):
        yield from _xz_chunks(raw)
    else:
        stream: Any = raw
        if name.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=raw)
        elif name.endswith(".bz2"):
            stream = bz2.BZ2File(raw)
        while chunk := cast(bytes, stream.read(_STEP)):
            yield chunk


def _zstd_chunks(raw: IO[bytes], window: int) -> Iterator[bytes]:
    """Decompress frame by frame: zstandard's own stream_reader reads a truncated file as a complete one."""
    try:
        import zstandard
    except ImportError:
        raise UserError("a .zst file needs the zstandard package: pip install 'gradus[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=window)
    chunk = raw.read(_ZSTD_STEP)
    try:
        while chunk:
            frame = decompressor.decompressobj()
            while not frame.eof:
                if not chunk:
                    raise EOFError("it is cut off")
                yield frame.decompress(chunk)
                chunk = (frame.unused_data if frame.eof else b"") or raw.read(_ZSTD_STEP)
    except zstandard.ZstdError as e:
        raise OSError(str(e)) from None


def _xz_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """Decompress stream by stream: lzma's own LZMAFile has no limit of memory."""
    chunk = raw.read(_STEP)
    try:
        while chunk:
            stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            while not stream.eof:
                if not chunk and stream.needs_input:
                    raise EOFError("it is cut off")
                yield stream.decompress(chunk, _STEP)
                chunk = raw.read(_STEP) if stream.needs_input and not stream.eof else b""
            chunk = (stream.unused_data or raw.read(_STEP)).lstrip(b"\0")  # streams are padded to 4 bytes
            while not chunk and (more := raw.read(_STEP)):
                chunk = more.lstrip(b"\0")
    except lzma.LZMAError as e:
        raise OSError(str(e)) from None

"""WARC, ARC and WET archives to documents, record by record.

Every record comes out as a document or as `Dropped`, with the position to go on from. A record is only given if another
one, or the end, follows after its length: so a wrong length or lost bytes cost the record in which they are and what
they hide, never one after it. Memory: a few times limits.page_mib, whatever the archive holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.read import Input
from data_pipeline.prepare.recipe_config import LimitsConfig
from data_pipeline.prepare.warc.byte_stream import BOMB, INSIDE, MIB, NEXT_RECORD, ByteStream
from data_pipeline.prepare.warc.compression import CUT_OFF, LINE, START, open_members
from data_pipeline.prepare.warc.records import EMPTY, TOO_LARGE, document, parse_header

HEADER = 1 << 16  # bytes at most
BLANKS = 1 << 10  # bytes at most between two records
BLANK = re.compile(rb"[\r\n]{0,%d}" % BLANKS)
NOT_ARCHIVE, NO_RECORD = "not a web archive", "no record begins where one should"
BAD_HEADER, BAD_LENGTH = "its header cannot be read", "its length is wrong"


def read(file: Input, limits: LimitsConfig, source: str, start: int = 0) -> Iterator[tuple[Document | Dropped, int]]:
    """Each record of `file`, in order, and the position from which reading gives the rest.

    A page has no text yet but metadata["html"], with the Content-Encoding undone; text/plain and WET have their text.
    """
    try:
        with file.path.open("rb") as raw:
            stream = ByteStream(open_members(raw, file.name, file.size), start)
            reader = _Reader(stream, file, limits, source)
            position = start
            while (item := reader.next()) is not None:
                position = stream.position()
                yield item, position
            if not position:
                yield Dropped(EMPTY, file.name), max(file.size, 1) * INSIDE
    except OSError as e:
        yield Dropped(f"cannot be read ({e.strerror})", file.name), file.size * INSIDE


class _Reader:
    def __init__(self, stream: ByteStream, file: Input, limits: LimitsConfig, corpus: str) -> None:
        self.stream = stream
        self.file = file
        self.corpus = corpus
        self.limit = int(limits.page_mib * MIB)
        self.ratio = limits.ratio

    def next(self) -> Document | Dropped | None:
        stream = self.stream
        while True:
            path, first = f"{self.file.name}:{stream.label()}", stream.position() == 0
            n = stream.available(LINE)
            if START.match(stream.held, stream.index, stream.index + n):
                return self._record(path)
            if not n and not stream.marks:
                return None
            reason = None
            if blank := self._end(0):
                stream.cursor += blank
            elif n:
                reason = self._skip(NO_RECORD, self._cut())
            if reason := reason or stream.cross():
                return Dropped(NOT_ARCHIVE if first and self._done() else reason, path)

    def _record(self, path: str) -> Document | Dropped:
        stream, start = self.stream, self.stream.cursor
        n = stream.available(HEADER)  # first: it may move what is held
        header, size = parse_header(stream.held, stream.index, stream.index + n)
        stream.cursor += size
        if header is None or header.length is None:
            short = header is None and stream.available(HEADER) < HEADER
            return Dropped(self._skip(BAD_HEADER, short), path)
        if header.length > self.limit:
            return Dropped(self._skip_large(header.length), path)
        size, end = header.length, self._end(header.length)
        if end is None and header.unix:
            size, end = self._to_next(header.length)
        if end is None:
            return Dropped(self._skip(BAD_LENGTH, stream.available(size) < size), path)
        content = bytes(memoryview(stream.held)[stream.index : stream.index + size])
        bomb = stream.is_bomb(start, stream.cursor + size, self.ratio)
        stream.cursor += end
        if reason := stream.cross() or (BOMB if bomb else None):
            return Dropped(reason, path)
        return document(header, content, self.limit, self.ratio, self.corpus, path)

    def _end(self, size: int) -> int | None:
        """Bytes to what comes after a record of `size` more bytes; None if no record, nor the end, comes there."""
        stream = self.stream
        wanted = size + BLANKS + LINE
        n = stream.available(wanted)
        if n < size:
            return None
        blank = BLANK.match(stream.held, stream.index + size, stream.index + n)
        assert blank
        end = blank.end() - stream.index
        if (member_end := stream.member_end(size, end)) is not None:
            return member_end
        follows = end == n < wanted or START.match(stream.held, blank.end(), stream.index + n)
        cut = size < end and n < wanted and self._cut(end)  # the first line of another record
        return end if follows or cut else None

    def _cut(self, after: int = 0) -> bool:
        """True if the archive ends within the line that is `after` bytes from the cursor."""
        stream = self.stream
        n = stream.available(LINE + after)
        return n < LINE + after and b"\n" not in stream.held[stream.index + after : stream.index + n]

    def _to_next(self, size: int) -> tuple[int, int | None]:
        """(bytes of this record, bytes to the next one) in a file whose line ends were made Unix's: its lengths are
        wrong."""
        stream = self.stream
        n = stream.available(self.limit)
        hit = NEXT_RECORD.search(stream.held, stream.index - 1, stream.index + n)
        end = hit.start(1) - stream.index if hit else n
        if end == self.limit or (not hit and n < size):
            return size, None
        return len(stream.held[stream.index : stream.index + end].rstrip(b"\n")), end

    def _skip_large(self, size: int) -> str:
        """Go past a record that is too large; the reason why it is dropped."""
        stream, end = self.stream, self.stream.cursor + size
        if reason := stream.skip(size, self.ratio):
            return reason
        if stream.cursor < end:
            return stream.cross() or (CUT_OFF if self._done() else BAD_LENGTH)
        if (blank := self._end(0)) is None:
            return self._skip(BAD_LENGTH)
        stream.cursor += blank
        return stream.cross() or TOO_LARGE

    def _skip(self, reason: str, short: bool = False) -> str:
        """Go to the next record; the reason why this one is dropped."""
        fault = self.stream.skip(None, self.ratio) or self.stream.cross()
        return fault or (CUT_OFF if short and self._done() else reason)

    def _done(self) -> bool:
        return not self.stream.available(1) and not self.stream.marks

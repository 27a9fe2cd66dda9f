"""WARC, ARC and WET archives to documents, record by record.

Every record comes out as a document or as `Dropped`, with the position to go on from. A record is only given when
another one, or the end, follows where its length says: so a wrong length or lost bytes cost the record in which they
are and what they hide, never one after it. Memory: a few times limits.page_mib, whatever the archive holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from datatrove.data import Document

from data_pipeline.corpus.read import Input
from data_pipeline.corpus.report import Dropped
from data_pipeline.prepare.recipe_config import LimitsConfig
from data_pipeline.prepare.warc.byte_stream import BEGINS, BOMB, INSIDE, MIB, ByteStream
from data_pipeline.prepare.warc.compression import CUT_OFF, LINE, START, members
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
            reader = _Reader(ByteStream(members(raw, file.name, file.size), start), file, limits, source)
            at = start
            while (item := reader.next()) is not None:
                yield item, (at := reader.tape.position())
            if not at:
                yield Dropped(EMPTY, file.name), max(file.size, 1) * INSIDE
    except OSError as e:
        yield Dropped(f"cannot be read ({e.strerror})", file.name), file.size * INSIDE


class _Reader:
    def __init__(self, tape: ByteStream, file: Input, limits: LimitsConfig, corpus: str) -> None:
        self.tape, self.file, self.corpus = tape, file, corpus
        self.most, self.ratio = int(limits.page_mib * MIB), limits.ratio

    def next(self) -> Document | Dropped | None:
        tape = self.tape
        while True:
            where, first = f"{self.file.name}:{tape.where()}", tape.position() == 0
            room = tape.reach(LINE)
            if START.match(tape.held, tape.here, tape.here + room):
                return self._record(where)
            if not room and not tape.marks:
                return None
            reason = None
            if blank := self._end(0):
                tape.at += blank
            elif room:
                reason = self._skip(NO_RECORD, self._cut())
            if reason := reason or tape.settle():
                return Dropped(NOT_ARCHIVE if first and self._done() else reason, where)

    def _record(self, where: str) -> Document | Dropped:
        tape, begun = self.tape, self.tape.at
        room = tape.reach(HEADER)  # first: it may move what is held
        header, size = parse_header(tape.held, tape.here, tape.here + room)
        tape.at += size
        if header is None or header.length is None:
            short = header is None and tape.reach(HEADER) < HEADER
            return Dropped(self._skip(BAD_HEADER, short), where)
        if header.length > self.most:
            return Dropped(self._pass(header.length), where)
        size, end = header.length, self._end(header.length)
        if end is None and header.unix:
            size, end = self._to_next(header.length)
        if end is None:
            return Dropped(self._skip(BAD_LENGTH, tape.reach(size) < size), where)
        content = bytes(memoryview(tape.held)[tape.here : tape.here + size])
        bomb = tape.bomb(begun, tape.at + size, self.ratio)
        tape.at += end
        if reason := tape.settle() or (BOMB if bomb else None):
            return Dropped(reason, where)
        return document(header, content, self.most, self.ratio, self.corpus, where)

    def _end(self, size: int) -> int | None:
        """Bytes from here to what comes after a record of `size` bytes more; None where nothing should begin there."""
        tape = self.tape
        want = size + BLANKS + LINE
        room = tape.reach(want)
        if room < size:
            return None
        blank = BLANK.match(tape.held, tape.here + size, tape.here + room)
        assert blank
        end = blank.end() - tape.here
        if (border := tape.border(size, end)) is not None:
            return border
        follows = end == room < want or START.match(tape.held, blank.end(), tape.here + room)
        cut = size < end and room < want and self._cut(end)  # the first line of another record
        return end if follows or cut else None

    def _cut(self, after: int = 0) -> bool:
        """Whether the archive ends within the line that is `after` bytes from here."""
        room = self.tape.reach(LINE + after)
        return room < LINE + after and b"\n" not in self.tape.held[self.tape.here + after : self.tape.here + room]

    def _to_next(self, size: int) -> tuple[int, int | None]:
        """Where line ends were made Unix's, lengths no longer hold: bytes of this record, and to the next one."""
        tape = self.tape
        room = tape.reach(self.most)
        found = BEGINS.search(tape.held, tape.here - 1, tape.here + room)
        end = found.start(1) - tape.here if found else room
        if end == self.most or (not found and room < size):
            return size, None
        return len(tape.held[tape.here : tape.here + end].rstrip(b"\n")), end

    def _pass(self, size: int) -> str:
        """Go past a record that is too large; why it is dropped."""
        tape, end = self.tape, self.tape.at + size
        if reason := tape.skip(size, self.ratio):
            return reason
        if tape.at < end:
            return tape.settle() or (CUT_OFF if self._done() else BAD_LENGTH)
        if (blank := self._end(0)) is None:
            return self._skip(BAD_LENGTH)
        tape.at += blank
        return tape.settle() or TOO_LARGE

    def _skip(self, reason: str, short: bool = False) -> str:
        """Go where the next record begins; why this one is dropped."""
        found = self.tape.skip(None, self.ratio) or self.tape.settle()
        return found or (CUT_OFF if short and self._done() else reason)

    def _done(self) -> bool:
        return not self.tape.reach(1) and not self.tape.marks

"""One stream of bytes over all members of a web archive, of which a few are held, and positions to go on from."""

from __future__ import annotations

import re
from collections import deque

from data_pipeline.prepare.warc.compression import BLOCK, LINE, START_OF_RECORD, Gap, Member, Plain, Zipped

MIB = 1 << 20
INSIDE = 1 << 48  # a position is the member's offset in the file times this, plus the bytes of it that came before
NEXT_RECORD = re.compile(rb"\n(" + START_OF_RECORD + rb")", re.IGNORECASE)
BOMB = "it expands beyond limits.ratio"


class ByteStream:
    """A cursor over the stream: it is at byte `cursor`, and `held[index : index + n]` are the next bytes, of which
    `available(n)` says how many there are."""

    def __init__(self, source: Plain | Zipped, start: int) -> None:
        self.source = source
        self.cursor = 0
        self.held = bytearray()
        self.base = 0  # byte of the stream that is held[0]
        self.marks: deque[tuple[int, Member | Gap]] = deque()  # from the cursor on
        self.stops: deque[int] = deque()  # those of them that no record goes past
        self.spent: deque[tuple[int, int]] = deque()  # (byte of the stream, byte of the file that it took)
        offset, inside = divmod(start, INSIDE)
        self._open(offset)
        while self.cursor < inside and (step := self.available(min(inside - self.cursor, MIB))):
            self.cursor += step

    def _open(self, offset: int) -> None:
        for queue in (self.held, self.marks, self.stops, self.spent):
            queue.clear()
        self.base = self.cursor
        self.member = (self.cursor, offset)
        self.spent.append(self.member)
        self.pieces = self.source.pieces(offset)
        self._pull()
        self.cross()

    @property
    def index(self) -> int:
        return self.cursor - self.base

    def position(self) -> int:
        start, offset = self.member
        inside = self.cursor - start
        return offset * INSIDE + inside if self.source.zipped else (offset + inside) * INSIDE

    def label(self) -> str:
        """The position for people: an offset in the file, +bytes in the member."""
        offset, inside = divmod(self.position(), INSIDE)
        return f"{offset}+{inside}" if inside else str(offset)

    def available(self, n: int) -> int:
        """Number of the next `n` bytes that come before a gap, a member that begins with a record, or the end."""
        while True:
            stop = self.stops[0] if self.stops else None
            end = self.base + len(self.held) if stop is None else stop
            if end - self.cursor >= n or stop is not None or not self._pull():
                return min(n, end - self.cursor)

    def _pull(self) -> bool:
        piece = next(self.pieces, None)
        if piece is None:
            return False
        end = self.base + len(self.held)
        if isinstance(piece, Member | Gap):
            self.marks.append((end, piece))
            if isinstance(piece, Gap) or piece.opens:
                self.stops.append(end)
            if isinstance(piece, Member):
                self.spent.append((end, piece.offset))
            return True
        if self.index > MIB:
            del self.held[: self.index - 1]  # the byte before may be the end of a line
            self.base = self.cursor - 1
            while len(self.spent) > 1 and self.spent[1][0] <= self.base:
                self.spent.popleft()
        self.held += piece.data
        self.spent.append((end + len(piece.data), piece.spent))
        return True

    def member_end(self, first: int, last: int) -> int | None:
        """Bytes to the end of a member, if one ends first..last bytes after the cursor."""
        return next((byte - self.cursor for byte, _ in self.marks if first <= byte - self.cursor <= last), None)

    def cross(self) -> str | None:
        """Enter the member that begins at the cursor, or leave a gap at the cursor behind and give its reason."""
        self.available(1)
        while self.marks and self.marks[0][0] <= self.cursor:
            byte, mark = self.marks.popleft()
            if isinstance(mark, Gap) or mark.opens:
                self.stops.popleft()
            if isinstance(mark, Gap):
                self._pull()  # the member after it
                self.cross()
                return mark.reason
            self.member = (byte, mark.offset)
            if byte == self.cursor:
                break
        return None

    def skip(self, limit: int | None, ratio: float) -> str | None:
        """Go to the next record, at most `limit` bytes from the cursor; the reason if something was in the way.

        It inflates no more than `ratio` times the bytes that the file has for it: what is beyond is left out.
        """
        start = self.cursor
        end = None if limit is None else start + limit
        while True:
            wanted = BLOCK + LINE if end is None else min(end - self.cursor, BLOCK + LINE)
            n = self.available(wanted)
            hit = NEXT_RECORD.search(self.held, max(self.index - 1, 0), self.index + n)
            if hit and (hit.end() < self.index + n or n < BLOCK):
                self.cursor += hit.start(1) - self.index
                return None
            self.cursor += n if n < wanted or n <= BLOCK else BLOCK
            if n < wanted or self.cursor == end:
                return None
            if self.is_bomb(start, self.cursor, ratio):
                self._open(self.source.find(self._spent(self.cursor)))
                return BOMB

    def is_bomb(self, start: int, end: int, ratio: float) -> bool:
        """True if bytes start..end of the stream are more than a megabyte and more than `ratio` times the file's."""
        size = end - start
        return size > MIB and self.source.zipped and size > ratio * (self._spent(end) - self._spent(start, before=True))

    def _spent(self, byte: int, before: bool = False) -> int:
        passed = 0
        for end, spent in self.spent:
            if (end >= byte and not before) or end > byte:
                return passed if before else spent
            passed = spent
        return passed

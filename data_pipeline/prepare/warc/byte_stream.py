"""One run of bytes over all members of a web archive, of which a few are held, and positions to go on from."""

from __future__ import annotations

import re
from collections import deque

from data_pipeline.prepare.warc.compression import BLOCK, LINE, START_OF_RECORD, Gap, Member, Plain, Zipped

MIB = 1 << 20
INSIDE = 1 << 48  # a position is the member's offset in the file times this, and how many of its bytes came before
BEGINS = re.compile(rb"\n(" + START_OF_RECORD + rb")", re.IGNORECASE)
BOMB = "it expands beyond limits.ratio"


class ByteStream:
    """Where we are on it is byte `at`; `held[here : here + n]` are the bytes there that `reach(n)` has found."""

    def __init__(self, source: Plain | Zipped, start: int) -> None:
        self.source = source
        self.held, self.base, self.at = bytearray(), 0, 0  # held[0] is byte `base`
        self.marks: deque[tuple[int, Member | Gap]] = deque()  # at or after `at`
        self.stops: deque[int] = deque()  # those of them that no record goes past
        self.spent: deque[tuple[int, int]] = deque()  # (byte of the tape, byte of the file that it took)
        offset, inside = divmod(start, INSIDE)
        self._begin(offset)
        while self.at < inside and (step := self.reach(min(inside - self.at, MIB))):
            self.at += step

    def _begin(self, offset: int) -> None:
        self.held.clear()
        self.marks.clear()
        self.stops.clear()
        self.spent.clear()
        self.base, self.member = self.at, (self.at, offset)
        self.spent.append((self.at, offset))
        self.pieces = self.source.pieces(offset)
        self._pull()
        self.settle()

    @property
    def here(self) -> int:
        return self.at - self.base

    def position(self) -> int:
        begun, offset = self.member
        inside = self.at - begun
        return offset * INSIDE + inside if self.source.zipped else (offset + inside) * INSIDE

    def where(self) -> str:
        """The same for people: an offset in the file, +bytes in the member."""
        offset, inside = divmod(self.position(), INSIDE)
        return f"{offset}+{inside}" if inside else str(offset)

    def reach(self, n: int) -> int:
        """How many of the next `n` bytes there are before a gap, a member that begins a record, or the end."""
        while True:
            stop = self.stops[0] if self.stops else None
            end = self.base + len(self.held) if stop is None else stop
            if end - self.at >= n or stop is not None or not self._pull():
                return min(n, end - self.at)

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
        if self.here > MIB:
            del self.held[: self.here - 1]  # the byte before may be the end of a line
            self.base = self.at - 1
            while len(self.spent) > 1 and self.spent[1][0] <= self.base:
                self.spent.popleft()
        self.held += piece.data
        self.spent.append((end + len(piece.data), piece.spent))
        return True

    def border(self, first: int, last: int) -> int | None:
        """Where a member ends, first..last bytes from here, if one does."""
        return next((at - self.at for at, _ in self.marks if first <= at - self.at <= last), None)

    def settle(self) -> str | None:
        """Enter the member that begins here, or leave a gap right here behind and give its reason."""
        self.reach(1)
        while self.marks and self.marks[0][0] <= self.at:
            at, mark = self.marks.popleft()
            if isinstance(mark, Gap) or mark.opens:
                self.stops.popleft()
            if isinstance(mark, Gap):
                self._pull()  # the member after it
                self.settle()
                return mark.reason
            self.member = (at, mark.offset)
            if at == self.at:
                break
        return None

    def skip(self, most: int | None, ratio: float) -> str | None:
        """Go to where the next record begins, at most `most` bytes from here; the reason of what stood in the way.

        It inflates no more than `ratio` times the bytes that the file has for it: what is beyond is left out.
        """
        begun = self.at
        end = None if most is None else begun + most
        while True:
            room = BLOCK + LINE if end is None else min(end - self.at, BLOCK + LINE)
            n = self.reach(room)
            before = max(self.here - 1, 0)
            found = BEGINS.search(self.held, before, self.here + n)
            if found and (found.end() < self.here + n or n < BLOCK):
                self.at += found.start(1) - self.here
                return None
            self.at += n if n < room or n <= BLOCK else BLOCK
            if n < room or self.at == end:
                return None
            if self.bomb(begun, self.at, ratio):
                self._begin(self.source.find(self._spent(self.at)))
                return BOMB

    def bomb(self, begun: int, end: int, ratio: float) -> bool:
        """Whether bytes begun..end of the tape are more than a megabyte and more than `ratio` times the file's."""
        size = end - begun
        return size > MIB and self.source.zipped and size > ratio * (self._spent(end) - self._spent(begun, before=True))

    def _spent(self, at: int, before: bool = False) -> int:
        passed = 0
        for end, spent in self.spent:
            if (end >= at and not before) or end > at:
                return passed if before else spent
            passed = spent
        return passed

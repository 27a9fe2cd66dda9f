"""Numbers, times and texts of others, as a terminal shows them."""

from __future__ import annotations

import time
from typing import Any

CHARS = 400  # of a text that somebody else wrote


def harmless(text: str, chars: int = CHARS) -> str:
    """One line without anything that a terminal obeys: what is not printable is written as Python writes it."""
    cut = text if len(text) <= chars else text[: chars - 1] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def number(value: Any, form: str) -> str:
    """A number in this form; what is none as it is."""
    return format(value, form) if isinstance(value, int | float) else str(value)


def span(seconds: float) -> str:
    """`47s`, `3m12s`, `5h07m`, `2d03h`."""
    s = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if s >= size:
            return f"{s // size}{unit}{s % size // below:02}{small}"
    return f"{s}s"


def ago(seconds: float) -> str:
    """An age; the clock that wrote may be ahead of this one."""
    return f"{span(seconds)} ago" if seconds > -1 else f"{span(-seconds)} in the future (the clocks disagree)"


def clock(seconds: Any) -> str:
    """A time in UTC."""
    if not isinstance(seconds, int | float):
        return "at no time"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))

"""What a check of a machine says: one line, good or not, and what to do about it. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

MOST = 600  # characters of a text: much of it is what other machines answered


class State(Enum):
    ok = "ok"
    warn = "warn"  # a run may work, slower or at more risk
    fail = "fail"  # a run will not work


@dataclass(frozen=True)
class Finding:
    name: str  # what was looked at
    state: State
    found: str
    cure: str = ""  # what to do, where it is not ok

    def __str__(self) -> str:
        return f"{self.state.value:<4}  {self.name}: {self.found}" + (f" -> {self.cure}" if self.cure else "")

    def as_json(self) -> dict[str, str]:
        return {**asdict(self), "state": self.state.value}


def ok(name: str, found: str) -> Finding:
    return Finding(plain(name), State.ok, plain(found))


def warn(name: str, found: str, cure: str) -> Finding:
    return Finding(plain(name), State.warn, plain(found), plain(cure))


def fail(name: str, found: str, cure: str) -> Finding:
    return Finding(plain(name), State.fail, plain(found), plain(cure))


def from_json(body: Any) -> Finding:
    """What `as_json` made, perhaps elsewhere. Raises ValueError, TypeError or KeyError where it is not that."""
    name, state, found, cure = (str(body[key]) for key in ("name", "state", "found", "cure"))
    return Finding(plain(name), State(state), plain(found), plain(cure))


def plain(text: str) -> str:
    """One line without what a terminal would obey."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
    return line if len(line) <= MOST else f"{line[:MOST]}…"

"""The result of one check of a machine: a line, its state, and a cure if the state is not ok. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

MAX_CHARS = 600  # of a text: much of it is the output of other machines


class State(Enum):
    ok = "ok"
    warn = "warn"  # a run may work, slower or at more risk
    fail = "fail"  # a run will not work


@dataclass(frozen=True)
class CheckResult:
    """Texts are made plain: one line, nothing that a terminal would obey."""

    name: str  # of the thing that was checked
    state: State
    text: str
    cure: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "text", "cure"):
            object.__setattr__(self, key, plain(getattr(self, key)))

    def __str__(self) -> str:
        return f"{self.state.value:<4}  {self.name}: {self.text}" + (f" -> {self.cure}" if self.cure else "")

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "state": self.state.value, "found": self.text, "cure": self.cure}


def ok(name: str, text: str) -> CheckResult:
    return CheckResult(name, State.ok, text)


def warn(name: str, text: str, cure: str) -> CheckResult:
    return CheckResult(name, State.warn, text, cure)


def fail(name: str, text: str, cure: str) -> CheckResult:
    return CheckResult(name, State.fail, text, cure)


def from_json(body: Any) -> CheckResult:
    """The result that `as_json` wrote. Raises ValueError, TypeError or KeyError for anything else."""
    return CheckResult(str(body["name"]), State(body["state"]), str(body["found"]), str(body["cure"]))


def plain(text: str) -> str:
    """One line without control characters, cut to MAX_CHARS."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
    return line if len(line) <= MAX_CHARS else f"{line[:MAX_CHARS]}…"

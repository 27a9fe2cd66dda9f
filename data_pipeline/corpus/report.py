"""What was kept and what was dropped, per reason: nothing leaves a corpus without a count and an example."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5  # of each reason are named, the first ones


@dataclass(frozen=True, slots=True)
class Dropped:
    """A piece of the input that became no document. `where` is file or file:line, relative to the corpus."""

    reason: str
    where: str


@dataclass
class Report:
    """Counts that do not depend on time, order of workers or restarts, so that the same input gives the same report."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def drop(self, item: Dropped) -> None:
        self.dropped[item.reason] += 1
        if len(self.examples[item.reason]) < EXAMPLES:
            self.examples[item.reason].append(item.where)

    def to_json(self) -> dict[str, Any]:
        drops = {r: {"count": n, "examples": self.examples[r]} for r, n in sorted(self.dropped.items())}
        return {"kept": self.kept, "dropped": drops}

    def summary(self) -> str:
        """One line: "12 kept; dropped: 2 not UTF-8, 1 empty"."""
        drops = ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items()))
        return f"{self.kept} kept; dropped: {drops or 'none'}"

    def print(self) -> None:
        """A small table on standard error, with an example of each reason."""
        print(f"  {self.kept:>12,}  documents kept", file=sys.stderr)
        for reason, count in sorted(self.dropped.items()):
            print(f"  {count:>12,}  dropped: {reason} (e.g. {self.examples[reason][0]})", file=sys.stderr)

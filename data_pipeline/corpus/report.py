"""Counts of documents kept and dropped, per reason and with samples: every record is in one of them.

The counts do not depend on time, on the order of workers or on restarts: the same input gives the same report.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline.corpus.document import Document, Dropped

SAMPLES = 5  # kept for each reason, the first ones
EXCERPT = 300  # characters of each


@dataclass
class Tally:
    """Documents, their bytes (UTF-8 of the text, or the page's own) and tokens (0 until they are counted)."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def count(self, doc: Document) -> None:
        page = doc.metadata.get("html")
        self.documents += 1
        self.bytes += len(doc.text.encode("utf-8", "surrogatepass")) if page is None else len(page)
        self.tokens += doc.metadata.get("tokens", 0)

    def add(self, other: Tally) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.tokens += other.tokens


@dataclass
class Report:
    """Counts of one step: documents taken, given on, and dropped for each reason, with samples [{id, url, text}]."""

    taken: Tally = field(default_factory=Tally)
    given: Tally = field(default_factory=Tally)
    dropped: dict[str, Tally] = field(default_factory=dict)
    samples: dict[str, list[dict[str, str | None]]] = field(default_factory=dict)
    split: int = 0  # documents added by splitting
    seconds: float = 0.0  # of this step alone; differs each time

    def kept(self, items: Iterable[Document | Dropped]) -> Iterator[Document]:
        """Count what a reader gives, and pass on its documents."""
        for item in items:
            if isinstance(item, Dropped):
                self.drop_record(item)
            else:
                self.taken.count(item)
                self.given.count(item)
                yield item

    def count_documents(self, n: int) -> None:
        """Count documents that are taken and passed on, without their sizes."""
        self.taken.documents += n
        self.given.documents += n

    def drop(self, reason: str, doc: Document) -> None:
        self.dropped.setdefault(reason, Tally()).count(doc)
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES:
            text = doc.text[:EXCERPT] if "html" not in doc.metadata else ""
            samples.append({"id": doc.id, "url": doc.metadata.get("url"), "text": text})

    def drop_record(self, item: Dropped) -> None:
        self.taken.documents += 1
        self.drop(item.reason, Document("", item.path))

    def add(self, other: Report) -> None:
        self.taken.add(other.taken)
        self.given.add(other.given)
        self.split += other.split
        self.seconds += other.seconds
        for reason, tally in other.dropped.items():
            self.dropped.setdefault(reason, Tally()).add(tally)
            samples = self.samples.setdefault(reason, [])
            samples += other.samples[reason][: SAMPLES - len(samples)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def totals(self) -> dict[str, Any]:
        """The counts of a reader as JSON, each reason with the paths of its first records."""
        drops = {
            reason: {"count": tally.documents, "examples": [sample["id"] for sample in self.samples[reason]]}
            for reason, tally in sorted(self.dropped.items())
        }
        return {"kept": self.given.documents, "dropped": drops}

    def summary(self) -> str:
        """One line: "12 kept; dropped: 2 not UTF-8, 1 empty"."""
        drops = ", ".join(f"{tally.documents} {reason}" for reason, tally in sorted(self.dropped.items()))
        return f"{self.given.documents} kept; dropped: {drops or 'none'}"

    def print(self) -> None:
        """A small table on standard error, with an example of each reason."""
        print(f"  {self.given.documents:>12,}  documents kept", file=sys.stderr)
        for reason, tally in sorted(self.dropped.items()):
            example = self.samples[reason][0]["id"]
            print(f"  {tally.documents:>12,}  dropped: {reason} (e.g. {example})", file=sys.stderr)

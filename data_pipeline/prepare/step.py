"""One step of a recipe, of datatrove's kind, that accounts for every document.

A document on its way is datatrove's: `id`, `text`, and in `metadata`

    url, date     where it is from and since when (ISO 8601), or absent
    source        the corpus
    path          file:position of the record
    html          bytes of the page, until the extractor has made text of it
    charset       what the HTTP header says of them, or absent
    tokens        of the text, once they are counted
    score         of the quality model, in 0..1
    language, language_score
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from time import perf_counter
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

SAMPLES = 5  # of what each reason dropped are kept, the first ones
EXCERPT = 300  # characters of each


@dataclass
class Tally:
    """Documents, their bytes (UTF-8 of the text, or the page's own) and tokens (0 where they are not counted yet)."""

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
class Passage:
    """What went through a step: into it, out of it, and dropped by each reason, with samples [{id, url, text}]."""

    taken: Tally = field(default_factory=Tally)
    given: Tally = field(default_factory=Tally)
    dropped: dict[str, Tally] = field(default_factory=dict)
    samples: dict[str, list[dict[str, str | None]]] = field(default_factory=dict)
    split: int = 0  # documents more that came of splitting
    seconds: float = 0.0  # of this step alone; not part of what is the same each time

    def drop(self, reason: str, doc: Document) -> None:
        self.dropped.setdefault(reason, Tally()).count(doc)
        found = self.samples.setdefault(reason, [])
        if len(found) < SAMPLES:
            text = doc.text[:EXCERPT] if "html" not in doc.metadata else ""
            found.append({"id": doc.id, "url": doc.metadata.get("url"), "text": text})

    def add(self, other: Passage) -> None:
        self.taken.add(other.taken)
        self.given.add(other.given)
        self.split += other.split
        self.seconds += other.seconds
        for reason, tally in other.dropped.items():
            self.dropped.setdefault(reason, Tally()).add(tally)
            found = self.samples.setdefault(reason, [])
            found += other.samples[reason][: SAMPLES - len(found)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Passage:
        dropped = {reason: Tally(**tally) for reason, tally in body["dropped"].items()}
        return cls(
            taken=Tally(**body["taken"]),
            given=Tally(**body["given"]),
            dropped=dropped,
            samples=body["samples"],
            split=body["split"],
            seconds=body["seconds"],
        )


class Step(PipelineStep):
    """Takes documents, changes them in place or drops them with a reason; what it did stands in `passage`."""

    type = "step"
    batch = 1  # documents that `apply` gets at a time
    rewrites = False  # it changes texts: their tokens are counted anew
    tokens: Callable[[Sequence[str]], list[int]] | None = None  # how many each text has; None = they are not counted

    def __new__(cls, *args: Any) -> Step:
        step = super().__new__(cls)
        step.made_of = args
        return step

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__()
        self.passage = Passage()

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that gets a step makes it anew: what it holds, a model for one, may not go through a pipe."""
        return type(self), self.made_of, {"tokens": self.tokens}

    @abstractmethod
    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        """For each document why it is dropped, or None; a reason is the same for all that it fits (no numbers)."""

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        documents = iter(data)
        while docs := list(islice(documents, self.batch)):
            for doc in docs:
                self.passage.taken.count(doc)
            begun = perf_counter()
            reasons = self.apply(docs)
            self.passage.seconds += perf_counter() - begun
            if self.rewrites:
                self.count_tokens([doc for doc, reason in zip(docs, reasons, strict=True) if reason is None])
            for doc, reason in zip(docs, reasons, strict=True):
                if reason is None:
                    self.passage.given.count(doc)
                    yield doc
                else:
                    self.passage.drop(reason, doc)

    def count_tokens(self, docs: Sequence[Document]) -> None:
        if self.tokens is not None:
            for doc, n in zip(docs, self.tokens([doc.text for doc in docs]), strict=True):
                doc.metadata["tokens"] = n

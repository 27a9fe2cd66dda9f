"""One step of a recipe, of datatrove's kind, which counts every document that it takes, passes on or drops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from time import perf_counter
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data_pipeline.corpus.document import Document
from data_pipeline.corpus.report import Report
from data_pipeline.corpus.workers import follow_parent

CountTokens = Callable[[Sequence[str]], list[int]]
"""The number of tokens of each text."""


class Call(PipelineStep):
    """datatrove's step that calls a function: `work()`, or `work(task, tasks)` if it is `numbered`."""

    type = "stage"

    def __init__(self, name: str, work: Callable[..., None], numbered: bool) -> None:
        self.name = name
        super().__init__()
        self.work = work
        self.numbered = numbered

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        self.work(*((rank, world_size) if self.numbered else ()))


class Step(PipelineStep):
    """Takes documents, changes them in place or drops them with a reason; `report` counts them."""

    type = "step"
    batch = 1  # documents that `apply` gets at a time
    rewrites = False  # it changes texts: their tokens are counted again
    tokens: CountTokens | None = None  # None = tokens are not counted

    def __new__(cls, *args: Any) -> Step:
        step = super().__new__(cls)
        step.arguments = args
        return step

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__()
        self.report = Report()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process builds the step again: its state, such as a model, may not be picklable."""
        return type(self), self.arguments, {"tokens": self.tokens}

    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        """For each document the reason that it is dropped for, without numbers in it, or None.

        A step that decides on each document by itself has `reason` instead.
        """
        return [self.reason(doc) for doc in docs]

    def reason(self, doc: Document) -> str | None:
        raise NotImplementedError

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        documents = iter(data)
        while docs := list(islice(documents, self.batch)):
            for doc in docs:
                self.report.taken.count(doc)
            start = perf_counter()
            reasons = self.apply(docs)
            self.report.seconds += perf_counter() - start
            if self.rewrites:
                self.count_tokens([doc for doc, reason in zip(docs, reasons, strict=True) if reason is None])
            for doc, reason in zip(docs, reasons, strict=True):
                if reason is None:
                    self.report.given.count(doc)
                    yield doc
                else:
                    self.report.drop(reason, doc)

    def count_tokens(self, docs: Sequence[Document]) -> None:
        if self.tokens is not None:
            for doc, n in zip(docs, self.tokens([doc.text for doc in docs]), strict=True):
                doc.metadata["tokens"] = n

"""The report of a recipe: what went into each step and out of it, what each reason dropped, with samples.

report.json and report.html say the same. Neither holds a time or a speed, so that the same input gives the same report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data_pipeline.corpus.child_process import follow_parent
from data_pipeline.files import publish, publish_json, read_json
from data_pipeline.prepare.parts import Mark
from data_pipeline.prepare.step import Passage

TEMPLATE = "report.html.jinja"


class WriteReport(PipelineStep):
    """Sums up the marks of some stages, in order.

    Args:
        marks: (stage, folder of its marks)
        more: JSON files that are taken into report.json under a name, where they are there
    """

    type, name = "stage", "report"

    def __init__(self, corpus: str, out: Path, marks: Sequence[tuple[str, Path]], more: dict[str, Path]) -> None:
        super().__init__()
        self.corpus, self.out, self.marks, self.more = corpus, out, marks, more

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        rows = [row for stage, folder in self.marks for row in funnel(stage, folder)]
        check(rows)
        body: dict[str, Any] = {"corpus": self.corpus, "funnel": [shown(*row) for row in rows]}
        body |= {name: read_json(path, "run the stage anew") for name, path in self.more.items() if path.exists()}
        publish_json(self.out / "report.json", body)
        publish(self.out / "report.html", page(body).encode())


def funnel(stage: str, folder: Path) -> list[tuple[str, str, Passage]]:
    """(stage, step, what went through it), all parts together, in the order of the steps."""
    total: dict[str, Passage] = {}
    for path in sorted(folder.glob("[0-9]*-*.json")):
        for step, passage in Mark.load(path).passages.items():
            total.setdefault(step, Passage()).add(passage)
    return [(stage, step, passage) for step, passage in total.items()]


def check(rows: Sequence[tuple[str, str, Passage]]) -> None:
    """Raises RuntimeError where a document went missing: in = out + drops in each step, and out = the next one's in.

    Links become records of archives, among which are others: those are counted from the archives on.
    """
    before: int | None = None
    for stage, step, passage in rows:
        before = None if (stage, step) == ("filter", "read") else before
        taken, given = passage.taken.documents, passage.given.documents
        dropped = sum(tally.documents for tally in passage.dropped.values())
        if taken + passage.split != given + dropped or before not in (None, taken):
            raise RuntimeError(
                f"{stage}, {step}: {before} documents came from the step before, {taken} went in and {passage.split} "
                f"more came of splitting, {given} came out and {dropped} were dropped: they do not add up"
            )
        before = given


def shown(stage: str, step: str, passage: Passage) -> dict[str, Any]:
    body = {"stage": stage, "step": step} | passage.to_json()
    del body["seconds"]
    return body | {"dropped": dict(sorted(body["dropped"].items())), "samples": dict(sorted(body["samples"].items()))}


def page(body: dict[str, Any]) -> str:
    """The report as one HTML page that needs nothing else; whatever came from documents is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("data_pipeline.prepare", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["thousands"] = lambda n: f"{n:,}"
    return environment.get_template(TEMPLATE).render(body)

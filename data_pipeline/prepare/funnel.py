"""The report of a recipe: the documents that went into each step and out of it, and those dropped, with samples.

report.json and report.html have the same content. Neither holds a time or a speed, so that the same input gives the
same report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.report import EXCERPT, Report
from data_pipeline.files import publish, publish_json, read_json
from data_pipeline.prepare.parts import Mark
from data_pipeline.prepare.readers import read_published

TEMPLATE = "report.html.jinja"


def write_report(corpus: str, out: Path, marks: Sequence[tuple[str, Path]], more: Mapping[str, Path]) -> None:
    """Add up the marks of some stages, in order, and write both reports into the folder `out`.

    Args:
        marks: (stage, folder of its marks)
        more: JSON files that report.json includes under a name, if they exist

    Raises:
        UserError: no document is left; both reports are there.
    """
    rows = [row for stage, folder in marks for row in funnel(stage, folder)]
    check(rows)
    body: dict[str, Any] = {"corpus": corpus, "funnel": [row_of(*row) for row in rows]}
    body |= {name: read_json(path, "run the stage again") for name, path in more.items() if path.exists()}
    if "duplicates" in body:
        for groups in body["duplicates"]["groups"].values():
            show_members(groups["largest"], out / "work" / "documents")
    publish_json(out / "report.json", body)
    publish(out / "report.html", page(body).encode())
    if not rows or not rows[-1][2].given.documents:
        raise nothing_kept(corpus, out, rows)


def show_members(groups: Sequence[dict[str, Any]], documents: Path) -> None:
    """Give each named member of the groups its id, url and the beginning of its text."""
    for group in groups:
        for member in [group, *group["members"]] if "members" in group else []:
            if "part" in member:
                path = documents / f"{member['part']}.jsonl.zst"
                file = Input(path, path.name, path.stat().st_size, 0)
                doc, _ = next(read_published(None, file, member["row"]))
                member |= {"id": doc.id, "url": doc.metadata.get("url"), "text": doc.text[:EXCERPT]}


def nothing_kept(corpus: str, out: Path, rows: Sequence[tuple[str, str, Report]]) -> UserError:
    """An output without a document, with the reason that dropped most."""
    taken = rows[0][2].taken.documents if rows else 0
    drops = [(tally.documents, reason, step) for _, step, report in rows for reason, tally in report.dropped.items()]
    most, reason, step = max(drops, default=(0, "there is none", "read"))
    return UserError(
        f"corpus={corpus}: no document is left of {taken:,} records; {step} dropped most, {most:,}: {reason}: change "
        f"the input or the recipe, and give another output= ({out / 'report.html'} has every reason)"
    )


def funnel(stage: str, folder: Path) -> list[tuple[str, str, Report]]:
    """(stage, step, counts over all parts), in the order of the steps."""
    total: dict[str, Report] = {}
    for path in sorted(folder.glob("[0-9]*-*.json")):
        for step, report in Mark.load(path).passages.items():
            total.setdefault(step, Report()).add(report)
    return [(stage, step, report) for step, report in total.items()]


def check(rows: Sequence[tuple[str, str, Report]]) -> None:
    """Raises RuntimeError if a document is missing: in = out + drops in each step, and out = the next one's in.

    Links become records of archives, which hold other records too: these are counted from the archives on.
    """
    before: int | None = None
    for stage, step, report in rows:
        before = None if (stage, step) == ("filter", "read") else before
        taken, given = report.taken.documents, report.given.documents
        dropped = sum(tally.documents for tally in report.dropped.values())
        if taken + report.split != given + dropped or before not in (None, taken):
            raise RuntimeError(
                f"{stage}, {step}: {before} documents came from the step before, {taken} went in and {report.split} "
                f"more came of splitting, {given} came out and {dropped} were dropped: they do not add up"
            )
        before = given


def row_of(stage: str, step: str, report: Report) -> dict[str, Any]:
    body = {"stage": stage, "step": step} | report.to_json()
    del body["seconds"]
    return body | {"dropped": dict(sorted(body["dropped"].items())), "samples": dict(sorted(body["samples"].items()))}


def page(body: dict[str, Any]) -> str:
    """The report as one HTML page without other files; text that comes from documents is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("data_pipeline.prepare", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["thousands"] = lambda n: f"{n:,}"
    return environment.get_template(TEMPLATE).render(body)

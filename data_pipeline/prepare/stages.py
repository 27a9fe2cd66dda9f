"""The stages of a recipe besides `Parts`, each a function: the work on all documents at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from conf.errors import UserError
from data_pipeline.corpus.document import Document
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.remote_inputs import fetched
from data_pipeline.files import publish_json
from data_pipeline.prepare.decontaminate.decontaminate import SUFFIX, Overlaps, report
from data_pipeline.prepare.decontaminate.sets import load_grams
from data_pipeline.prepare.dedup.clusters import SUMMARY, find, reasons
from data_pipeline.prepare.dedup.documents import Other
from data_pipeline.prepare.dedup.keys import write_keys
from data_pipeline.prepare.parts import Mark, Read, exclusive, marks_of
from data_pipeline.prepare.readers import PublishedFiles
from data_pipeline.prepare.recipe_config import DecontaminateConfig, DedupConfig, FetchPagesConfig, LinksConfig
from data_pipeline.prepare.step import Call, Step
from data_pipeline.prepare.web.fetch import fetch
from data_pipeline.prepare.web.links import write_links

SETS = "sets.json"


@dataclass(frozen=True)
class Stage:
    """`tasks` of one step that may run at the same time; the next stage starts when all have ended."""

    name: str
    step: PipelineStep
    tasks: int
    repeat: bool = False  # run it even if it is complete: it checks that itself


def stage(name: str, work: Callable[..., None], *args: object, tasks: int | None = None) -> Stage:
    """A stage that calls `work(*args)` once, or, given a number of tasks, `work(*args, task, tasks)` in each."""
    return Stage(name, Call(name, partial(work, *args), tasks is not None), tasks or 1)


def write_part_keys(cfg: DedupConfig, folder: Path, part: str, docs: Sequence[Document]) -> None:
    """Write the keys of a part's documents."""
    if docs:
        write_keys(folder / f"{part}.safetensors", docs, cfg)


def others(cfg: DedupConfig) -> list[Other]:
    """The corpora to compare with: outputs of recipes that look for duplicates too."""
    works = [Path(other) / "work" for other in cfg.against]
    return [Other(work.parent.name, work / "keys", work / "duplicates") for work in works]


def find_duplicates(cfg: DedupConfig, keys: Path, out: Path) -> None:
    keys.mkdir(exist_ok=True)  # missing if no document is left
    with exclusive(0, out):
        if (out / SUMMARY).exists():
            return
        for other in others(cfg):
            if other.codes and not (other.codes / SUMMARY).exists():
                raise UserError(f"dedup.against: {other.codes / SUMMARY}: not there: run that recipe to its end")
        find(keys, others(cfg), cfg, out)


class Duplicates(Step):
    """Drops the documents that `find_duplicates` marked."""

    batch = 1024

    def __init__(self, cfg: DedupConfig) -> None:
        super().__init__("duplicates")
        self.reasons = reasons([other.name for other in others(cfg)])

    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        return [self.reasons[doc.metadata.pop("duplicate")] for doc in docs]


def count_overlaps(
    cfg: DecontaminateConfig, files: PublishedFiles, read: Read, out: Path, task: int, tasks: int
) -> None:
    """Count in how many of the kept documents each n-gram of the evaluation sets occurs."""
    with exclusive(task, out):
        if (out / f"{task:05d}{SUFFIX}").exists():
            return
        overlaps = Overlaps(load_grams(cfg))
        docs = (doc for file in files(task) for doc, _ in read(file, 0) if isinstance(doc, Document))
        overlaps.count(doc.text for doc in docs if not doc.metadata.get("duplicate"))
        overlaps.save(out / f"{task:05d}")


def report_overlaps(cfg: DecontaminateConfig, out: Path) -> None:
    """Write which examples of the evaluation sets the documents hold, before they are cut out."""
    publish_json(out / SETS, report(Overlaps.load(load_grams(cfg), out), cfg))


def collect_links(dumps: Sequence[Input], cfg: LinksConfig, out: Path) -> None:
    with exclusive(0, out):
        if not marks_of(out, 0):
            counts = write_links([fetched(dump, out / "dumps") for dump in dumps], cfg, out)
            Mark(last=True, passages={"links": counts}).save(out / "00000-00000.json")


def fetch_pages(links: Path, cfg: FetchPagesConfig, out: Path, marks: Path, task: int, tasks: int) -> None:
    with exclusive(task, marks):
        counts = fetch(links, out, task, tasks, cfg)
        Mark(last=True, passages={"fetch": counts}).save(marks / f"{task:05d}-00000.json")

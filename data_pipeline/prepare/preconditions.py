"""Files that recipes read besides their input: checked before any work starts, and part of the plan of an output."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from conf.errors import UserError
from data_pipeline.corpus.corpus_config import CorpusFormat
from data_pipeline.prepare.decontaminate.sets import load_grams
from data_pipeline.prepare.dedup.clusters import SUMMARY
from data_pipeline.prepare.parts import vocabulary
from data_pipeline.prepare.prepare_config import Executor, ExecutorConfig, PrepareConfig, RawConfig
from data_pipeline.prepare.quality.model import Model
from data_pipeline.prepare.recipe_config import DedupConfig
from data_pipeline.remote.backends import is_remote


def corpora(cfg: PrepareConfig) -> Iterator[tuple[str, RawConfig]]:
    """(prefix of its keys, corpus) of each corpus to make."""
    if cfg.corpus.format is not CorpusFormat.several:
        yield "corpus.", cfg.corpus
    else:
        yield from ((f"corpus.sources.{name}.", source) for name, source in cfg.corpus.sources.items())


def inputs_of(cfg: PrepareConfig) -> Iterator[tuple[str, str]]:
    """(key, value) of each path or URL that documents or their pages are read from."""
    for prefix, corpus in corpora(cfg):
        yield ("input" if corpus is cfg.corpus else f"{prefix}path"), str(corpus.path)
        if corpus.recipe.links and corpus.recipe.links.pages:
            yield f"{prefix}recipe.links.pages", corpus.recipe.links.pages


def files_of(cfg: PrepareConfig) -> Iterator[tuple[str, str]]:
    """(key, path) of each other file or folder that steps read, without those that this run makes itself."""
    made: set[Path] = set()
    trained = cfg.corpus.quality.output if cfg.corpus.quality else None
    for prefix, corpus in corpora(cfg):
        recipe, key = corpus.recipe, f"{prefix}recipe."
        if recipe.url:
            yield from ((f"{key}url.blocklists", path) for path in recipe.url.blocklists)
            yield from ((f"{key}url.words", path) for path in recipe.url.words)
        if recipe.bad_words:
            yield f"{key}bad_words.file", recipe.bad_words.file
        if recipe.quality and recipe.quality.model != trained:
            yield f"{key}quality.model", recipe.quality.model
        if recipe.decontaminate:
            yield from ((f"{key}decontaminate.sets", path) for path in recipe.decontaminate.sets)
        for other in recipe.dedup.against if recipe.dedup else []:
            if Path(other) not in made:
                yield f"{key}dedup.against", str(Path(other) / "work" / "duplicates" / SUMMARY)
        if recipe.dedup and corpus is not cfg.corpus:  # for those that are made after it
            made.add(Path(cfg.output) / prefix.removeprefix("corpus.sources.")[:-1])


def check(cfg: PrepareConfig) -> None:
    """Check the config against the files on the disk.

    Raises:
        UserError: a file that steps read is missing or damaged; an output inside its own input; a rule
            about tokens without a tokenizer; a stage that needs more memory than its task gets.
    """
    for key, path in inputs_of(cfg):
        if not is_remote(path) and _reads(path, Path(cfg.output).resolve()):
            why = "is all read" if Path(path).is_dir() else "may match its files"
            raise UserError(f"output={cfg.output} lies in {key}={path}, which {why}: give one outside of it")
    for prefix, corpus in corpora(cfg):
        if corpus.recipe.dedup:
            _check_dedup(f"{prefix}recipe.dedup", corpus.recipe.dedup, cfg.executor)
    for key, path in files_of(cfg):
        if key.endswith("dedup.against") and not Path(path).is_file():
            raise UserError(f"{key}: no {path}: give outputs of recipes with dedup, of which each is complete")
        if key.endswith("quality.model"):
            Model.load(Path(path))
    if cfg.tokenizer is not None:
        vocabulary(cfg.tokenizer)
    for prefix, corpus in corpora(cfg):
        length = corpus.recipe.length
        if length and length.min_tokens and cfg.tokenizer is None:
            raise UserError(
                f"{prefix}recipe.length.min_tokens={length.min_tokens}, but tokenizer=null counts none: give a "
                f"tokenizer, or min_tokens=0"
            )
        if corpus.recipe.decontaminate:
            load_grams(corpus.recipe.decontaminate)


def _reads(pattern: str, output: Path) -> bool:
    """True if `pattern`, a folder or a glob, covers files below `output`."""
    path = Path(pattern)
    if path.is_dir():
        return output.is_relative_to(path.resolve())
    if path.is_file() or not glob.has_magic(pattern):
        return False
    fixed = next(p for p in path.parents if not glob.has_magic(str(p)))
    if not output.is_relative_to(fixed.resolve()):
        return False
    folders = output.relative_to(fixed.resolve()).parts
    for n, part in enumerate(path.relative_to(fixed).parts):
        if part == "**" or n == len(folders):
            return True
        if not fnmatchcase(folders[n], part):
            return False
    return False  # it matches only a folder


def _check_dedup(key: str, dedup: DedupConfig, executor: ExecutorConfig) -> None:
    names: dict[str, str] = {}
    for other in dedup.against:
        if (before := names.setdefault(Path(other).name, other)) is not other:
            raise UserError(
                f"{key}.against: {before} and {other} have the same name, by which the report tells them apart: rename "
                f"one of the folders"
            )
    if executor.name is not Executor.local and dedup.memory_gib + 1 > executor.memory_gib:
        raise UserError(
            f"{key}.memory_gib={dedup.memory_gib} and 1 GiB beside it are more than executor.memory_gib="
            f"{executor.memory_gib}: give less of the first or more of the second"
        )

"""Settings of `python -m data_pipeline.prepare.run`, and their checks before any work starts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from conf.errors import MISSING, UserError
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.files import check_output
from data_pipeline.prepare.quality.config import QualityTrainConfig
from data_pipeline.prepare.recipe_config import RecipeConfig
from data_pipeline.shards.shards_config import PackingConfig


@dataclass
class RawConfig(CorpusConfig):
    """A corpus and its recipe."""

    recipe: RecipeConfig = field(default_factory=RecipeConfig)

    def __post_init__(self) -> None:
        if self.format is CorpusFormat.pydocs:
            raise UserError(f"corpus={self.name}: is clean text already: data_pipeline.shards write takes it")
        if self.format is not CorpusFormat.several and not self.path:
            key = "input" if isinstance(self, CorporaConfig) else f"corpus.sources.{self.name}.path"
            raise UserError(f"corpus={self.name} reads {self.format.value}: say where, {key}=FILE_OR_FOLDER")
        if (self.format is CorpusFormat.links) != (self.recipe.links is not None):
            raise UserError(
                f"corpus={self.name}: recipe.links={'null' if self.recipe.links is None else 'given'} with "
                f"format={self.format.value}: links are what a corpus of format=links has, and no other"
            )
        if self.recipe.fetch is not None and self.format is not CorpusFormat.links:
            raise UserError(
                f"corpus={self.name}: recipe.fetch=given with format={self.format.value}: pages are fetched for a "
                f"corpus of format=links alone, leave it out"
            )
        if self.format in (CorpusFormat.warc, CorpusFormat.links) and self.recipe.extractor is None:
            raise UserError(
                f"corpus={self.name}: recipe.extractor=null, but its pages are HTML: give fast or best (WET's text "
                f"goes through either as it is)"
            )


@dataclass
class CorporaConfig(RawConfig):
    """A corpus, or several, each with its own recipe."""

    sources: dict[str, RawConfig] = field(default_factory=dict)  # in this order; each is made in output/NAME
    quality: QualityTrainConfig | None = None  # trained before the first source that uses its model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format is CorpusFormat.several and (self.path or not self.sources):
            raise UserError(
                f"corpus={self.name} is several corpora ({', '.join(self.sources) or 'none is given'}), input="
                f"{self.path or 'null'}: each has its own, corpus.sources.NAME.path=FILE_OR_FOLDER"
            )
        if self.format is CorpusFormat.several and self.recipe != RecipeConfig():
            raise UserError(
                f"corpus={self.name} is several corpora, and corpus.recipe is given: each has its own, "
                f"corpus.sources.NAME.recipe"
            )
        if self.format is not CorpusFormat.several and (self.sources or self.quality):
            key = "sources" if self.sources else "quality"
            raise UserError(
                f"corpus={self.name}: corpus.{key}=given with format={self.format.value}: it is for a corpus of "
                f"format=several, leave it out"
            )


class Executor(Enum):
    """datatrove's executors."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass
class ExecutorConfig:
    """The executor of the tasks. The output does not depend on it."""

    name: Executor = Executor.local  # where the tasks run
    workers: int = 0  # tasks at a time; 0 = local: one for each core, slurm and ray: all
    memory_gib: int = 4  # slurm and ray: of each task
    partition: str | None = None  # slurm
    time: str = "24:00:00"  # slurm: limit of a task
    setup: str | None = None  # slurm: a line of shell before the task, which selects this Python
    sbatch: dict[str, str] = field(default_factory=dict)  # slurm: more options of sbatch, without their dashes

    def __post_init__(self) -> None:
        if self.workers < 0 or self.memory_gib < 1:
            raise UserError(
                f"executor.workers={self.workers} and executor.memory_gib={self.memory_gib}: give 0 or more workers, "
                f"and at least 1 GiB"
            )
        if self.name is Executor.slurm and not self.partition:
            raise UserError("executor=slurm: say where, executor.partition=NAME (sinfo lists them)")


@dataclass
class RecipeShardsConfig(PackingConfig):
    """Shards of a recipe's documents, in output/shards; `data_pipeline.shards write` makes them later as well."""

    write: bool = False  # make them as the last stage


@dataclass
class PrepareConfig:
    """`python -m data_pipeline.prepare.run`: raw archives, links or books to documents, and a report."""

    corpus: CorporaConfig = MISSING
    input: str | None = None  # a file, a folder (searched through), a glob or a URL; corpora of several: sources' paths
    output: str = MISSING  # receives documents/, report.json and report.html
    tokenizer: str | None = "gpt2"  # counts tokens for the report and for lengths; null = they are not counted
    shards: RecipeShardsConfig = field(default_factory=RecipeShardsConfig)
    task_mib: float = 64.0  # small files are put together in tasks of at least this size
    part_mib: float = 64.0  # of pages or text, after which a task publishes its documents; a restart continues there
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        check_output(self.output)
        if not (0 < self.part_mib < float("inf") and 0 < self.task_mib < float("inf")):
            raise UserError(f"part_mib={self.part_mib} and task_mib={self.task_mib}: give sizes above 0")
        if self.shards.write and self.tokenizer is None:
            raise UserError("shards.write=true, but tokenizer=null: shards hold token ids, give a tokenizer")

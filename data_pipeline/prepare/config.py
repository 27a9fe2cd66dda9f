"""What a user may say about making shards, and what is refused before any work starts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from data_pipeline.config import MISSING, UserError
from data_pipeline.prepare.quality_config import QualityTrainConfig
from data_pipeline.prepare.recipe import RecipeConfig


class CorpusFormat(Enum):
    pydocs = "pydocs"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"  # FineWeb's form
    books = "books"  # one document each: EPUB, and any other file as plain text
    warc = "warc"  # WARC, ARC and WET archives
    links = "links"  # Reddit's submissions; the pages they point to are the documents
    several = "several"  # corpora, each of its own format


@dataclass
class CorpusConfig:
    """Where documents come from. `path` is a file, a folder (searched through) or a glob; pydocs has none."""

    name: str = MISSING
    format: CorpusFormat = MISSING
    path: str | None = None
    text_key: str = "text"  # jsonl, parquet: the field or column that holds the text
    id_key: str = "id"  # jsonl, parquet: what names the document; one without it is named file:line

    def __post_init__(self) -> None:
        if self.format is not CorpusFormat.pydocs and not self.path:
            raise UserError(
                f"corpus={self.name} reads {self.format.value} files: say where, corpus.path=FILE_OR_FOLDER"
            )


@dataclass
class RawConfig(CorpusConfig):
    """A corpus and what is done to it."""

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
    """A corpus, or several, each with a recipe of its own."""

    sources: dict[str, RawConfig] = field(default_factory=dict)  # in this order; each is made in output/NAME
    quality: QualityTrainConfig | None = None  # trained before the first source that is scored by what it makes

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
    """Who runs the tasks. What comes out does not depend on it."""

    name: Executor = Executor.local
    workers: int = 0  # tasks at a time; 0 = local: one for each core, slurm and ray: all
    memory_gib: int = 4  # slurm and ray: of each task
    partition: str | None = None  # slurm
    time: str = "24:00:00"  # slurm: limit of a task
    setup: str | None = None  # slurm: a line of shell before the task, which makes this Python the one that runs
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
class PrepareConfig:
    """`python -m data_pipeline.prepare.run`: raw archives, links or books to documents, and a report."""

    corpus: CorporaConfig = MISSING
    input: str | None = None  # a file, a folder (searched through), a glob or a URL; corpora of several: sources' paths
    output: str = MISSING  # receives documents/, report.json and report.html
    tokenizer: str | None = "gpt2"  # counts tokens for the report and for lengths; null = they are not counted
    task_mib: float = 64.0  # small files are put together in tasks of at least this size
    part_mib: float = 64.0  # of pages or text, after which a task publishes its documents; a restart goes on from there
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        if not (0 < self.part_mib < float("inf") and 0 < self.task_mib < float("inf")):
            raise UserError(f"part_mib={self.part_mib} and task_mib={self.task_mib}: give sizes above 0")


@dataclass
class BpeTrainConfig:
    """`python -m data_pipeline.bpe train`: learn a byte-level BPE vocabulary."""

    corpus: CorpusConfig = MISSING
    vocab_size: int = 2048  # 256 bytes + merges + <|endoftext|>
    output: str = MISSING  # folder that receives tokenizer.json

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= 2**31:
            raise UserError(
                f"vocab_size={self.vocab_size}: a byte-level vocabulary has 256 bytes and <|endoftext|>, "
                f"give at least 257"
            )


@dataclass
class BpeCodeConfig:
    """`python -m data_pipeline.bpe encode|decode`: text to a JSON list of ids and back."""

    tokenizer: str = MISSING  # "gpt2", or a folder (or file) that holds a tokenizer
    text: str | None = None  # encode: null = standard input
    ids: list[int] | None = None  # decode: null = a JSON list on standard input


@dataclass
class ShardsConfig:
    """`python -m data_pipeline.shards write`: documents to tar shards with manifests."""

    corpus: CorpusConfig = MISSING
    tokenizer: str = MISSING  # "gpt2", or a folder (or file) that holds a tokenizer
    output: str = MISSING  # receives train/ and val/
    val_fraction: float = 0.01  # of the documents, chosen by content hash
    shard_tokens: int = 5_000_000  # a shard is closed at the first document past this many tokens
    block_tokens: int = 65_536  # one tar member holds about this many tokens: the unit of reading and of checksums
    workers: int = 0  # processes; 0 = one for each core

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: give a share of the documents, 0 <= val_fraction < 1")
        _check_sizes(self.block_tokens, self.shard_tokens)
        if self.workers < 0:
            raise UserError(f"workers={self.workers}: give the number of processes, or 0 for one for each core")


class TokenFormat(Enum):
    nanogpt = "nanogpt"  # .bin: a line of uint16 ids, also llm.c's with its header
    megatron = "megatron"  # .bin with .idx
    mds = "mds"  # MosaicML streaming: index.json with shard.*.mds, plain, .zstd or .gz
    jsonl = "jsonl"  # lines of JSON, plain, .gz or .zst, with a list of ids in the field tokens_key


class Split(Enum):
    train = "train"
    val = "val"


class Width(Enum):
    uint16 = "uint16"
    int32 = "int32"
    uint32 = "uint32"
    int64 = "int64"


@dataclass
class ImportConfig:
    """`python -m data_pipeline.shards import`: other programs' files of token ids to a source."""

    format: TokenFormat = MISSING
    input: str = MISSING  # a file, a folder (searched through) or a glob
    tokenizer: str = MISSING  # the one that the ids were made with: "gpt2", or a folder (or file) that holds it
    output: str = MISSING  # receives the folder of the split
    split: Split = Split.train
    packed: bool = False  # the documents are pieces of one stream: cut it at end-of-text, as nanogpt always is
    dtype: Width | None = None  # of nanogpt files without a header (null: uint16), and of mds columns of bytes
    tokens_key: str = "tokens"  # jsonl and mds: the field or column that holds the ids
    id_key: str = "id"  # jsonl, parquet: what names the document; one without it is named file:line
    shard_tokens: int = 5_000_000  # as in `shards write`
    block_tokens: int = 65_536

    def __post_init__(self) -> None:
        _check_sizes(self.block_tokens, self.shard_tokens)
        if self.dtype and self.format in (TokenFormat.megatron, TokenFormat.jsonl):
            raise UserError(f"dtype={self.dtype.value}: {self.format.value} files say it themselves, leave it out")


class ExportFormat(Enum):
    nanogpt = "nanogpt"  # .bin alone
    megatron = "megatron"  # .bin and .idx


@dataclass
class ExportConfig:
    """`python -m data_pipeline.shards export`: the tokens of a source, in order, to one .bin file."""

    path: str = MISSING  # a folder with a manifest.json, such as DIR/train
    output: str = MISSING  # FILE.bin
    format: ExportFormat = ExportFormat.nanogpt

    def __post_init__(self) -> None:
        if not self.output.endswith(".bin"):
            raise UserError(f"output={self.output}: give the name of a file that ends in .bin")


def _check_sizes(block_tokens: int, shard_tokens: int) -> None:
    if not 0 < block_tokens <= shard_tokens:
        given = f"block_tokens={block_tokens} and shard_tokens={shard_tokens}"
        raise UserError(f"{given}: give 0 < block_tokens <= shard_tokens")


@dataclass
class VerifyConfig:
    """`python -m data_pipeline.shards verify`: re-read every byte of a source and compare it with its manifest."""

    path: str = MISSING

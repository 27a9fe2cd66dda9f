"""Settings of the commands that write, check, import and export shards and train a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from conf.errors import MISSING, UserError
from data_pipeline.corpus.corpus_config import CorpusConfig
from data_pipeline.files import check_output


@dataclass
class BpeTrainConfig:
    """`python -m data_pipeline.bpe train`: learn a byte-level BPE vocabulary."""

    corpus: CorpusConfig = MISSING
    vocab_size: int = 2048  # 256 bytes + merges + <|endoftext|>
    output: str = MISSING  # folder that receives tokenizer.json

    def __post_init__(self) -> None:
        check_output(self.output)
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
class PackingConfig:
    """Sizes and validation share of shards."""

    val_fraction: float = 0.01  # of the documents, chosen by content hash
    shard_tokens: int = 5_000_000  # a shard is closed at the first document past this many tokens
    block_tokens: int = 65_536  # one tar member holds about this many tokens: the unit of reading and of checksums

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: give a share of the documents, 0 <= val_fraction < 1")
        _check_sizes(self.block_tokens, self.shard_tokens)


@dataclass
class ShardsConfig(PackingConfig):
    """`python -m data_pipeline.shards write`: documents to tar shards with manifests."""

    corpus: CorpusConfig = MISSING
    tokenizer: str = MISSING  # "gpt2", or a folder (or file) that holds a tokenizer
    output: str = MISSING  # receives train/ and val/
    workers: int = 0  # processes; 0 = one for each core

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output)
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
    split: Split = Split.train  # the folder of the source, in output
    packed: bool = False  # the documents are pieces of one stream: cut it at end-of-text, as nanogpt always is
    dtype: Width | None = None  # of nanogpt files without a header (null: uint16), and of mds columns of bytes
    tokens_key: str = "tokens"  # jsonl and mds: the field or column that holds the ids
    id_key: str = "id"  # jsonl, parquet: what names the document; one without it is named file:line
    shard_tokens: int = 5_000_000  # as in `shards write`
    block_tokens: int = 65_536  # as in `shards write`

    def __post_init__(self) -> None:
        check_output(self.output)
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
        check_output(self.output)
        if not self.output.endswith(".bin"):
            raise UserError(f"output={self.output}: give the name of a file that ends in .bin")


def _check_sizes(block_tokens: int, shard_tokens: int) -> None:
    if not 0 < block_tokens <= shard_tokens:
        given = f"block_tokens={block_tokens} and shard_tokens={shard_tokens}"
        raise UserError(f"{given}: give 0 < block_tokens <= shard_tokens")


@dataclass
class VerifyConfig:
    """`python -m data_pipeline.shards verify`: re-read every byte of a source and compare it with its manifest."""

    path: str = MISSING  # a folder with a manifest.json, or with such folders: a path or a URL

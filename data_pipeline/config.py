"""What a user may say about data, and what is refused before any work starts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: every operand, and the knob to turn."""


MISSING: Any = "???"  # OmegaConf's mark for "must be given"; written out so that this file needs no OmegaConf


class CorpusFormat(Enum):
    pydocs = "pydocs"
    text = "text"
    jsonl = "jsonl"


@dataclass
class CorpusConfig:
    """Where documents come from. `path` is a file, a folder (searched through) or a glob; pydocs has none."""

    name: str = MISSING
    format: CorpusFormat = MISSING
    path: str | None = None
    text_key: str = "text"  # jsonl: the field that holds the text
    id_key: str = "id"  # jsonl: the field that names the document; lines without it are named file:line

    def __post_init__(self) -> None:
        if self.format is not CorpusFormat.pydocs and not self.path:
            raise UserError(
                f"corpus={self.name} reads {self.format.value} files: say where, corpus.path=FILE_OR_FOLDER"
            )


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
        if not 0 < self.block_tokens <= self.shard_tokens:
            raise UserError(
                f"block_tokens={self.block_tokens} and shard_tokens={self.shard_tokens}: "
                f"give 0 < block_tokens <= shard_tokens"
            )
        if self.workers < 0:
            raise UserError(f"workers={self.workers}: give the number of processes, or 0 for one for each core")


@dataclass
class VerifyConfig:
    """`python -m data_pipeline.shards verify`: re-read every byte of a source and compare it with its manifest."""

    path: str = MISSING


@dataclass
class DataConfig:
    """What a run trains on: the folder that `data_pipeline.shards write` made."""

    name: str = MISSING
    path: str = MISSING  # holds train/ and val/, each with a manifest.json
    lanes: int = MISSING  # fixed for the run; every data-parallel size that divides it gives the same batches

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise UserError(f"data.lanes={self.lanes}: give at least 1")

    @property
    def train(self) -> Path:
        return Path(self.path) / "train"

    @property
    def val(self) -> Path:
        return Path(self.path) / "val"


@dataclass(frozen=True)
class Geometry:
    """How one step's windows fall on ranks and micro steps."""

    windows_per_step: int
    windows_per_rank: int
    micro_batch_size: int  # windows per rank per micro step
    grad_accum_steps: int
    lanes: int
    dp: int


def batch_geometry(*, tokens_per_step: int, n_ctx: int, micro_batch_size: int, lanes: int, dp: int) -> Geometry:
    """Derive `grad_accum_steps` from what is declared.

    Raises:
        UserError: a number that does not divide, with the nearest ones that do.
    """
    if tokens_per_step < 1 or tokens_per_step % n_ctx:
        raise UserError(
            f"tokens_per_step={tokens_per_step} is not a multiple of model.n_ctx={n_ctx}: "
            f"give tokens_per_step={_nearest(tokens_per_step, n_ctx * lanes)}"
        )
    windows = tokens_per_step // n_ctx
    if windows % lanes:
        raise UserError(
            f"tokens_per_step={tokens_per_step} / model.n_ctx={n_ctx} = {windows} windows a step, not a "
            f"multiple of data.lanes={lanes}: give tokens_per_step={_nearest(tokens_per_step, n_ctx * lanes)}, "
            f"or data.lanes that divides {windows}"
        )
    if lanes % dp:
        good = [d for d in range(1, lanes + 1) if lanes % d == 0]
        near = sorted(good, key=lambda d: (abs(d - dp), d))[:2]
        fit = [n for n in range(dp, windows + 1, dp) if windows % n == 0]
        fit = sorted(sorted(fit, key=lambda n: abs(n - lanes))[:2])
        new_run = f"data.lanes={' or '.join(map(str, fit))}"
        if not fit:
            tokens = _nearest(tokens_per_step, n_ctx * dp)
            new_run = f"data.lanes={dp} and tokens_per_step={tokens} ({dp} ranks cannot share {windows} windows a step)"
        raise UserError(
            f"dp={dp} does not divide data.lanes={lanes}: run on dp={' or '.join(map(str, sorted(near)))} "
            f"(dp = ranks / parallel.tp), or start a new run with {new_run}"
        )
    if micro_batch_size < 1 or (windows // dp) % micro_batch_size:
        raise UserError(
            f"micro_batch_size={micro_batch_size} does not divide the {windows // dp} windows of a rank "
            f"(tokens_per_step={tokens_per_step} / model.n_ctx={n_ctx} / dp={dp}): give micro_batch_size="
            f"{_divisor_near(windows // dp, micro_batch_size)}"
        )
    return Geometry(windows, windows // dp, micro_batch_size, windows // dp // micro_batch_size, lanes, dp)


def _nearest(value: int, multiple: int) -> str:
    low = value // multiple * multiple
    return f"{low} or {low + multiple}" if low else str(low + multiple)


def _divisor_near(n: int, wish: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wish), d))

"""The manifest of a source and the index of each shard: read, write, verify. Standard library and numpy.

A *source* is a folder:

    manifest.json     what is here: shards with bytes, sha256, documents, tokens; dtype; tokenizer hash
    tokenizer.json    the tokenizer the ids were made with
    00000.tar         a webdataset tar; each sample is a block of whole documents' token ids
    00000.idx.json    the shard's index: blocks (member, tokens, crc32) and documents (id, tokens)
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ShardInfo:
    """One tar: `name` is its file name inside the source."""

    name: str
    bytes: int
    sha256: str
    documents: int
    tokens: int

    def windows(self, n_ctx: int) -> int:
        """Windows of n_ctx + 1 tokens, neighbours sharing one; a shorter tail is unused."""
        return max(0, (self.tokens - 1) // n_ctx)


@dataclass(frozen=True)
class Manifest:
    """What a source holds. `root` is where it was read from."""

    root: Path
    source: str
    split: str
    dtype: str  # uint16 or uint32, little-endian
    vocab_size: int
    eot_id: int | None  # ends each document; None where the vocabulary has none (GPT-1)
    tokenizer_sha256: str
    shards: tuple[ShardInfo, ...]

    @cached_property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.shards)

    @cached_property
    def documents(self) -> int:
        return sum(s.documents for s in self.shards)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")


@dataclass(frozen=True)
class Block:
    """One tar member's tokens: the unit of checksums."""

    member: str
    tokens: int
    crc32: int


@dataclass(frozen=True)
class ShardIndex:
    """What is inside a shard, in order. Token offsets follow by adding up."""

    blocks: tuple[Block, ...]
    document_ids: tuple[str, ...]
    document_tokens: tuple[int, ...]


def write_manifest(manifest: Manifest) -> None:
    """Publish `manifest.json` in `manifest.root`, atomically."""
    body = {k: v for k, v in asdict(manifest).items() if k != "root"}
    publish_json(manifest.root / MANIFEST, {"format": FORMAT, **body})


def read_manifest(root: Path | str) -> Manifest:
    """Raises UserError where there is no manifest, or one that this version cannot read."""
    root = Path(root)
    body = _read_json(root / MANIFEST, "make it with `python -m data_pipeline.shards write`")
    if body.pop("format", None) != FORMAT:
        raise UserError(f"{root / MANIFEST}: not a manifest of format {FORMAT}: write the shards anew")
    try:
        shards = tuple(ShardInfo(**s) for s in body.pop("shards"))
        return Manifest(root=root, shards=shards, **body)
    except (TypeError, KeyError) as e:
        raise UserError(f"{root / MANIFEST}: damaged manifest ({e}): write the shards anew") from None


def index_path(manifest: Manifest, shard: ShardInfo) -> Path:
    return manifest.root / f"{Path(shard.name).stem}.idx.json"


def write_index(path: Path, index: ShardIndex) -> None:
    publish_json(path, {"format": FORMAT, **asdict(index)})


def read_index(path: Path) -> ShardIndex:
    body = _read_json(path, "write the shards anew")
    try:
        blocks = tuple(Block(**b) for b in body["blocks"])
        return ShardIndex(blocks, tuple(body["document_ids"]), tuple(body["document_tokens"]))
    except (TypeError, KeyError) as e:
        raise UserError(f"{path}: damaged index ({e}): write the shards anew") from None


def publish_json(path: Path, body: dict[str, Any]) -> None:
    """Write aside, fsync, rename: a reader sees the old file or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as f:
        json.dump(body, f, ensure_ascii=False, indent=1 if len(body) < 32 else None)
        f.flush()
        os.fsync(f.fileno())
    aside.replace(path)


def _read_json(path: Path, cure: str) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: {cure}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: not JSON ({e}): {cure}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path}: not a JSON object: {cure}")
    return body

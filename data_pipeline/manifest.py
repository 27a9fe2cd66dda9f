"""The manifest of a source and the index of each shard: read, write, verify. Standard library and numpy.

A *source* is a folder:

    manifest.json     what is here: shards with bytes, sha256, documents, tokens; dtype; tokenizer hash
    tokenizer.json    the tokenizer the ids were made with
    00000.tar         a webdataset tar; each sample is a block of whole documents' token ids
    00000.idx.json    the shard's index: blocks (member, tokens, crc32) and documents (id, tokens)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REPORT = "report.json"  # beside the sources: what was kept of the corpus and what was dropped
SPLITS = ("train", "val")
_MEMBER = re.compile(r"\d+\.npy")
_MOST = 1 << 48  # bytes or tokens of a shard: 256 TB, and a line of many such still adds up in 64 bits
_ANEW = "write the shards anew"


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

    @cached_property
    def sha256(self) -> str:
        """Of the shards' own sha256 in order: the same data, wherever it lies."""
        return hashlib.sha256("".join(s.sha256 for s in self.shards).encode()).hexdigest()

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
    path = root / MANIFEST
    body = read_json(path, "make it with `python -m data_pipeline.shards write`")
    if body.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a manifest of format {FORMAT}: {_ANEW}")
    try:
        shards = tuple(ShardInfo(**s) for s in body.pop("shards"))
        manifest = Manifest(root=root, shards=shards, **body)
    except (TypeError, KeyError) as e:
        raise UserError(f"{path}: damaged manifest ({e}): {_ANEW}") from None
    if manifest.dtype not in ("uint16", "uint32"):
        raise UserError(f"{path}: damaged manifest (dtype={manifest.dtype!r}, not uint16 or uint32): {_ANEW}")
    size, eot = manifest.vocab_size, manifest.eot_id
    known = type(size) is int and 0 < size <= 1 << 32
    if not known or (eot is not None and not (type(eot) is int and 0 <= eot < size)):
        raise UserError(f"{path}: damaged manifest (vocab_size={size!r}, eot_id={eot!r}): {_ANEW}")
    for shard in shards:
        numbers = (shard.bytes, shard.documents, shard.tokens)
        if not isinstance(shard.name, str) or Path(shard.name).name != shard.name:  # a path could point anywhere
            raise UserError(f"{path}: damaged manifest (shard name {shard.name!r} is not a file name): {_ANEW}")
        if not isinstance(shard.sha256, str) or any(type(n) is not int or not 0 <= n < _MOST for n in numbers):
            raise UserError(
                f"{path}: damaged manifest (shard {shard.name}: bytes, documents, tokens = {numbers}, "
                f"sha256 {shard.sha256!r}): {_ANEW}"
            )
    return manifest


def index_path(manifest: Manifest, shard: ShardInfo) -> Path:
    return manifest.root / index_name(shard.name)


def index_name(shard: str) -> str:
    return f"{Path(shard).stem}.idx.json"


def write_index(path: Path, index: ShardIndex) -> None:
    publish_json(path, {"format": FORMAT, **asdict(index)}, indent=None)


def read_index(path: Path) -> ShardIndex:
    """Raises UserError where the index is missing or damaged."""
    body = read_json(path, _ANEW)
    try:
        blocks = tuple(Block(**b) for b in body["blocks"])
        for block in blocks:
            if not _MEMBER.fullmatch(block.member) or type(block.crc32) is not int:
                raise ValueError(f"block {block.member!r} with crc32 {block.crc32!r}")
        return ShardIndex(blocks, tuple(body["document_ids"]), tuple(body["document_tokens"]))
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path}: damaged index ({e}): {_ANEW}") from None


def encode_block(ids: np.ndarray) -> bytes:
    """A block's tokens [n] as the bytes of a .npy file."""
    out = io.BytesIO()
    np.lib.format.write_array(out, ids, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def decode_block(data: bytes, dtype: np.dtype[Any]) -> np.ndarray:
    """The tokens [n] in the bytes of a .npy file, as a read-only view of them.

    Raises:
        ValueError: anything but a one-dimensional array of `dtype` that fills the bytes exactly.
    """
    head = io.BytesIO(data)
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    shape, _, found = np.lib.format.read_array_header_1_0(head)
    at = head.tell()
    if found != dtype or len(shape) != 1 or shape[0] * dtype.itemsize != len(data) - at:
        raise ValueError(f"{found} {shape} in {len(data) - at} bytes, not a line of {dtype} tokens that fills them")
    return np.frombuffer(data, dtype, offset=at)


def publish_json(path: Path, body: dict[str, Any], indent: int | None = 1) -> None:
    publish(path, (json.dumps(body, ensure_ascii=False, indent=indent) + "\n").encode())


def publish(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename: a reader sees the old file or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    rename(aside, path)


def rename(aside: Path, path: Path) -> None:
    """Move a fsynced file to its name, and make the move itself last."""
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """Raises UserError, ending in `cure`, where `path` is missing or not a JSON object."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {(e.strerror or str(e)).lower()}: {cure}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e}): {cure}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path}: not a JSON object: {cure}")
    return body

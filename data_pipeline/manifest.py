"""The manifest of a source and the index of each shard: read, write, verify. Standard library and numpy.

A *source* is a folder:

    manifest.json     the content: shards with bytes, sha256, documents, tokens; dtype; tokenizer hash
    tokenizer.json    the tokenizer the ids were made with
    00000.tar         a webdataset tar; each sample is a block of whole documents' token ids
    00000.idx.json    the shard's index: its sha256, blocks (member, tokens, crc32, offset) and documents (id, tokens)
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from conf.errors import UserError
from data_pipeline.files import from_json, publish, publish_json, read_json

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REPORT = "report.json"  # beside the sources: what was kept of the corpus and what was dropped
SPLITS = ("train", "val")
_ANEW = "write the shards again"

Count = Annotated[int, range(1 << 48)]  # bytes or tokens of a shard: 256 TB, and many such still add up in 64 bits
FileName = Annotated[str, re.compile(r"(?!\.{1,2}$)[^/\0]+"), "a file name"]  # a path leads out of the folder
Member = Annotated[str, re.compile(r"\d+\.npy"), "digits and .npy"]


@dataclass(frozen=True)
class ShardInfo:
    """One tar: `name` is its file name inside the source."""

    name: FileName
    bytes: Count
    sha256: str
    documents: Count
    tokens: Count

    def windows(self, n_ctx: int) -> int:
        """Windows of n_ctx + 1 tokens, neighbours sharing one; a shorter tail is unused."""
        return max(0, (self.tokens - 1) // n_ctx)


@dataclass(frozen=True)
class Manifest:
    """The content of a source.

    `root` is the folder it was read from. If that is only the copy of its small files in a cache, `origin` is the URL
    that its shards and their indexes come from (data_pipeline/remote/).
    """

    root: Path
    source: str
    split: str
    dtype: Annotated[str, re.compile("uint(16|32)"), "uint16 or uint32"]  # little-endian
    vocab_size: Annotated[int, range(1, (1 << 32) + 1)]
    eot_id: int | None  # ends each document; None if the vocabulary has none (GPT-1)
    tokenizer_sha256: str
    shards: tuple[ShardInfo, ...]
    origin: str | None = None  # not written

    def __post_init__(self) -> None:
        if self.eot_id is not None and not 0 <= self.eot_id < self.vocab_size:
            raise UserError(f"vocab_size={self.vocab_size}, eot_id={self.eot_id}, not an id of the vocabulary")

    @cached_property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.shards)

    @cached_property
    def documents(self) -> int:
        return sum(s.documents for s in self.shards)

    @cached_property
    def sha256(self) -> str:
        """A hash of the shards' hashes, in order: the same for the same data in any folder."""
        return hashlib.sha256("".join(s.sha256 for s in self.shards).encode()).hexdigest()

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")


@dataclass(frozen=True)
class Block:
    """One tar member's tokens: the unit of checksums and of reading.

    They are the bytes [offset, offset + tokens * itemsize) of the shard, behind the tar's header and numpy's.
    """

    member: Member
    tokens: Count
    crc32: Count
    offset: Count


@dataclass(frozen=True)
class ShardIndex:
    """The blocks and documents of a shard, in order. Token offsets follow by adding up.

    `shard_sha256` names the shard: the index of a shard that was replaced since is not the manifest's.
    """

    blocks: tuple[Block, ...]
    document_ids: tuple[str, ...]
    document_tokens: tuple[Count, ...]
    shard_sha256: str

    @cached_property
    def starts(self) -> list[int]:
        """The first token of each block, and the number of all tokens."""
        return list(accumulate((block.tokens for block in self.blocks), initial=0))

    def blocks_of(self, start: int, stop: int) -> range:
        """The blocks that hold the tokens [start, stop)."""
        return range(bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop))


def write_manifest(manifest: Manifest) -> None:
    """Publish `manifest.json` in `manifest.root`, atomically."""
    body = {k: v for k, v in asdict(manifest).items() if k not in ("root", "origin")}
    publish_json(manifest.root / MANIFEST, {"format": FORMAT, **body})


def read_manifest(root: Path | str) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        UserError: no manifest, a damaged one, or one of another format.
    """
    root = Path(root)
    path = root / MANIFEST
    body = read_json(path, "make it with `python -m data_pipeline.shards write`")
    if body.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a manifest of format {FORMAT}: {_ANEW}")
    return from_json(Manifest, body, path, _ANEW, root=root, origin=None)


def index_path(manifest: Manifest, shard: ShardInfo) -> Path:
    return manifest.root / index_name(shard.name)


def index_name(shard: str) -> str:
    return f"{Path(shard).stem}.idx.json"


def write_index(path: Path, index: ShardIndex) -> None:
    publish(path, _lean({"format": FORMAT, **asdict(index)}) + b"\n")


def read_index(path: Path) -> ShardIndex:
    """Read the index of a shard.

    Raises:
        UserError: no index, a damaged one, or one of another format.
    """
    body = read_json(path, _ANEW)
    if body.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not an index of format {FORMAT}: {_ANEW}")
    return from_json(ShardIndex, body, path, _ANEW)


def index_of(manifest: Manifest, shard: ShardInfo, path: Path | None = None) -> ShardIndex:
    """Read a shard's index and compare it with the manifest.

    Raises:
        UserError: as `read_index`; the index of another shard, or blocks outside it or overlapping blocks.
    """
    path = path or index_path(manifest, shard)
    index, itemsize = read_index(path), manifest.numpy_dtype.itemsize
    counts = len(index.document_ids), len(index.document_tokens), sum(index.document_tokens)
    if index.shard_sha256 != shard.sha256:
        raise UserError(f"{path}: of shard sha256 {index.shard_sha256!r}, the manifest says {shard.sha256}: {_ANEW}")
    blocks = sum(b.tokens for b in index.blocks)
    if counts != (shard.documents, shard.documents, shard.tokens) or blocks != shard.tokens:
        raise UserError(f"{path}: its index counts other tokens than the manifest's {shard.tokens}: {_ANEW}")
    if shard.tokens * itemsize > shard.bytes:
        raise UserError(f"{path}: {shard.bytes} bytes cannot hold the manifest's {shard.tokens} tokens: {_ANEW}")
    end = 0
    for block in index.blocks:
        if block.offset < end or block.offset + block.tokens * itemsize > shard.bytes:
            raise UserError(
                f"{path}: sample {block.member}: bytes from {block.offset} for {block.tokens} tokens, in a shard of "
                f"{shard.bytes} whose sample before ends at {end}: {_ANEW}"
            )
        end = block.offset + block.tokens * itemsize
    return index


def provenance(origins: Sequence[dict[str, str]], tokens: Sequence[int]) -> bytes:
    """The .json of a block: one column per property of its documents, so that no key repeats for each of them.

    `source` is the block's; `paths` and `urls` are there if any document has one, a path only if it is not the id.
    """
    body: dict[str, Any] = {"source": origins[0]["source"], "ids": [o["id"] for o in origins], "tokens": list(tokens)}
    paths = [o["path"] if o["path"] != o["id"] else None for o in origins]
    urls = [o.get("url") for o in origins]
    body |= {name: column for name, column in (("paths", paths), ("urls", urls)) if any(x is not None for x in column)}
    return _lean(body)


def _lean(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


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
    shape, _, stored = np.lib.format.read_array_header_1_0(head)
    start = head.tell()
    if stored != dtype or len(shape) != 1 or shape[0] * dtype.itemsize != len(data) - start:
        raise ValueError(f"{stored} {shape} in {len(data) - start} bytes, not a line of {dtype} tokens that fills them")
    return np.frombuffer(data, dtype, offset=start)

"""The manifest of a source and the index of each shard: read, write, verify. Standard library and numpy.

A *source* is a folder:

    manifest.json     what is here: shards with bytes, sha256, documents, tokens; dtype; tokenizer hash
    tokenizer.json    the tokenizer the ids were made with
    00000.tar         a webdataset tar; each sample is a block of whole documents' token ids
    00000.idx.json    the shard's index: its sha256, blocks (member, tokens, crc32, offset) and documents (id, tokens)
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from data_pipeline.files import publish, publish_json, read_json

FORMAT = 2
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
    """What a source holds. `root` is the folder it was read from; where that is the copy of small files in a cache,
    `origin` is the place that the shards come from (data_pipeline/remote/fetch.py), and the indexes with them."""

    root: Path
    source: str
    split: str
    dtype: str  # uint16 or uint32, little-endian
    vocab_size: int
    eot_id: int | None  # ends each document; None where the vocabulary has none (GPT-1)
    tokenizer_sha256: str
    shards: tuple[ShardInfo, ...]
    origin: str | None = None  # not written

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
    """One tar member's tokens: the unit of checksums and of reading.

    They are the bytes [offset, offset + tokens * itemsize) of the shard, behind the tar's header and numpy's.
    """

    member: str
    tokens: int
    crc32: int
    offset: int


@dataclass(frozen=True)
class ShardIndex:
    """What is inside a shard, in order. Token offsets follow by adding up.

    `shard_sha256` says which shard this is: an index beside a shard that was replaced is not the manifest's.
    """

    blocks: tuple[Block, ...]
    document_ids: tuple[str, ...]
    document_tokens: tuple[int, ...]
    shard_sha256: str


def write_manifest(manifest: Manifest) -> None:
    """Publish `manifest.json` in `manifest.root`, atomically."""
    body = {k: v for k, v in asdict(manifest).items() if k not in ("root", "origin")}
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
        manifest = Manifest(root=root, shards=shards, origin=None, **body)
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
        name = shard.name
        if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\0"} & set(name):  # a path leads out
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
    publish(path, _lean({"format": FORMAT, **asdict(index)}) + b"\n")


def read_index(path: Path) -> ShardIndex:
    """Raises UserError where the index is missing, damaged or of another format."""
    body = read_json(path, _ANEW)
    if body.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not an index of format {FORMAT}: {_ANEW}")
    try:
        index = ShardIndex(
            tuple(Block(**b) for b in body.pop("blocks")),
            tuple(body.pop("document_ids")),
            tuple(body.pop("document_tokens")),
            **body,
        )
        for block in index.blocks:
            numbers = (block.tokens, block.crc32, block.offset)
            if not _MEMBER.fullmatch(block.member) or not _are_counts(numbers):
                raise ValueError(f"block {block.member!r}: tokens, crc32, offset = {numbers}")
        if not {*map(type, index.document_ids)} <= {str}:
            raise ValueError("document_ids are not all text")
        if not _are_counts(index.document_tokens):
            raise ValueError("document_tokens are not all whole numbers of 0 or more")
        return index
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path}: damaged index ({e}): {_ANEW}") from None


def _are_counts(numbers: Sequence[Any]) -> bool:
    """Whether all are integers of 0 or more that a shard can count to."""
    return not numbers or (set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < _MOST)


def index_of(manifest: Manifest, shard: ShardInfo, path: Path | None = None) -> ShardIndex:
    """A shard's index, held against the manifest.

    Raises:
        UserError: as `read_index`; the index of another shard, or blocks that lie outside it or over one another.
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
    """What a block's .json says of its documents: columns, so that no word is said for each document again.

    `source` is the block's; `paths` and `urls` are there where a document has one, a path only where it is not the id.
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
    shape, _, found = np.lib.format.read_array_header_1_0(head)
    at = head.tell()
    if found != dtype or len(shape) != 1 or shape[0] * dtype.itemsize != len(data) - at:
        raise ValueError(f"{found} {shape} in {len(data) - at} bytes, not a line of {dtype} tokens that fills them")
    return np.frombuffer(data, dtype, offset=at)

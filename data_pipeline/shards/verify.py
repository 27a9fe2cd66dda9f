"""Check that a source is whole: re-read every byte and compare it with the manifest and the indexes.

The files of a URL are copied, one shard at a time, and the copies are checked.
Reads tars with the standard library only, so that the check shares no code with the writer and runs without webdataset.
Nothing in a shard is executed, and no more memory is used than the shard's own size.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.files import read_json
from data_pipeline.manifest import (
    MANIFEST,
    REPORT,
    SPLITS,
    TOKENIZER,
    Block,
    Manifest,
    ShardIndex,
    ShardInfo,
    decode_block,
    index_name,
    index_path,
    read_index,
    read_manifest,
)
from data_pipeline.remote.backends import is_remote, shown
from data_pipeline.shards.copies import at_hand, manifest_of_copy, names_at, small_files
from data_pipeline.shards.shards_config import VerifyConfig
from data_pipeline.tokenizer.tokenizer import Tokenizer

OURS = re.compile(r".*\.tar|.*\.idx\.json")


def verify(cfg: VerifyConfig) -> None:
    """Check the source at `path`, or all sources in the folder `path`; print each defect with its file.

    Raises:
        UserError: there is a defect, or no source.
        TransientError: a URL that does not answer.
    """
    if not is_remote(cfg.path):
        _verify(Path(cfg.path), cfg.path, read_manifest)
        return
    with small_files(cfg.path) as copies:
        try:
            _verify(copies, shown(cfg.path), partial(manifest_of_copy, cfg.path, copies))
        except UserError as e:
            raise type(e)(str(e).replace(str(copies), shown(cfg.path))) from None


def _verify(root: Path, name: str, read: Callable[[Path], Manifest]) -> None:
    below = {p.parent for p in root.glob("*/*") if p.name == MANIFEST or p.suffix == ".tar"}
    folders = [root] if (root / MANIFEST).exists() else sorted(below)
    sources = [folder for folder in folders if (folder / MANIFEST).exists()]
    if not sources:
        raise UserError(f"path={name}: no {MANIFEST} there or one folder below: give what `shards write` made")
    manifests = [read(source) for source in sources]
    defects = [f"{folder}: shards, but no {MANIFEST}" for folder in folders if folder not in sources]
    defects += [line for manifest in manifests for line in _source(manifest)]
    defects += _report(root / REPORT, manifests)
    defects += [line for m in manifests if m.root != root for line in _report(m.root / REPORT, [m])]  # of an import
    for line in defects:
        print(line.replace(str(root), name))
    if defects:
        raise UserError(f"path={name}: {len(defects)} defects in {len(sources)} sources, listed above: write it again")
    shards, documents = sum(len(m.shards) for m in manifests), sum(m.documents for m in manifests)
    tokens = sum(m.tokens for m in manifests)
    print(f"{name}: ok, {len(sources)} sources, {shards} shards, {documents:,} documents, {tokens:,} tokens")


def _report(path: Path, manifests: list[Manifest]) -> Iterator[str]:
    """Compare the counts in the writer's report, if there is one, with the sources."""
    if not path.is_file():
        return
    report = read_json(path, "write the shards again")
    sources = {m.root.name: {"documents": m.documents, "tokens": m.tokens} for m in manifests}
    for split in SPLITS:
        promised, counts = report.get(split), sources.get(split, {"documents": 0, "tokens": 0})
        if not isinstance(promised, dict) or not counts.items() <= promised.items():
            yield f"{path}: {split} {promised}, the shards hold {counts}"


def _source(manifest: Manifest) -> Iterator[str]:
    """Every defect of one source, as lines `file[, member]: what`."""
    yield from _tokenizer(manifest, manifest.root / TOKENIZER)
    expected = {name for shard in manifest.shards for name in (shard.name, index_name(shard.name))}
    present = (p.name for p in manifest.root.iterdir()) if manifest.origin is None else names_at(manifest.origin)
    for name in sorted(present):
        if OURS.fullmatch(name) and name not in expected:
            yield f"{manifest.root / name}: not in the manifest"
    for shard in manifest.shards:
        with at_hand(manifest, shard) as (near, missing):
            for line in missing or _shard(near, shard):
                yield line.replace(str(near.root), str(manifest.root))


def _tokenizer(manifest: Manifest, path: Path) -> Iterator[str]:
    raw = path.read_bytes() if path.is_file() else None
    sha256 = "none" if raw is None else hashlib.sha256(raw).hexdigest()
    if raw is None or sha256 != manifest.tokenizer_sha256:
        yield f"{path}: sha256 {sha256}, the manifest says {manifest.tokenizer_sha256}"
        return
    try:
        tokenizer = Tokenizer(raw, str(path))
    except UserError as e:
        yield str(e)
        return
    if (tokenizer.vocab_size, tokenizer.eot_id) != (manifest.vocab_size, manifest.eot_id):
        yield (
            f"{path}: {tokenizer.vocab_size} ids, end-of-text {tokenizer.eot_id}; "
            f"the manifest says {manifest.vocab_size} and {manifest.eot_id}"
        )


def _shard(manifest: Manifest, shard: ShardInfo) -> Iterator[str]:
    path = manifest.root / shard.name
    try:
        with path.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        yield f"{path}: {e.strerror}"
        return
    if path.stat().st_size != shard.bytes:
        yield f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}"
    if sha256 != shard.sha256:
        yield f"{path}: sha256 {sha256}, the manifest says {shard.sha256}"
    try:
        index = read_index(index_path(manifest, shard))
        counts = len(index.document_ids), len(index.document_tokens), sum(index.document_tokens)
        blocks = sum(b.tokens for b in index.blocks)
    except (UserError, TypeError) as e:
        yield f"{index_path(manifest, shard)}: {e}"
        return
    if index.shard_sha256 != shard.sha256:
        yield f"{index_path(manifest, shard)}: of shard {index.shard_sha256}, the manifest says {shard.sha256}"
    if counts != (shard.documents, shard.documents, shard.tokens) or blocks != shard.tokens:
        yield (
            f"{index_path(manifest, shard)}: {counts[0]} documents with {counts[1]} lengths and {counts[2]} tokens in "
            f"blocks of {blocks}, the manifest says {shard.documents} documents and {shard.tokens} tokens"
        )
    yield from _tar(manifest, path, shard, index)


def _tar(manifest: Manifest, path: Path, shard: ShardInfo, index: ShardIndex) -> Iterator[str]:
    """Compare the tar with its index, block by block."""
    blocks = {b.member.removesuffix(".npy"): b for b in index.blocks}
    unseen = {f"{key}.{part}" for key in blocks for part in ("npy", "json")}
    halves: dict[str, dict[str, bytes]] = {}
    ends: dict[str, int] = {}  # byte behind a block's tokens
    documents: list[tuple[Any, Any]] = []
    try:
        with path.open("rb") as f, tarfile.open(fileobj=f, mode="r|") as tar:
            for member in tar:
                if member.name not in unseen or member.type != tarfile.REGTYPE:
                    yield f"{path}, {member.name}: not in the index, or twice in the shard"
                    continue
                if member.issparse() or member.size > shard.bytes:  # a hole of any size would be filled with zeros
                    yield f"{path}, {member.name}: claims {member.size} bytes in a shard of {shard.bytes}"
                    continue
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                unseen.remove(member.name)
                key, _, part = member.name.partition(".")
                if part == "npy":
                    ends[key] = member.offset_data + member.size
                halves.setdefault(key, {})[part] = data
                if len(halves[key]) == 2:
                    for defect in _block(manifest, blocks[key], halves.pop(key), ends[key], documents):
                        yield f"{path}, {key}: {defect}"
    except (tarfile.TarError, OSError, ValueError) as e:
        yield f"{path}: not a whole tar ({e})"
    for name in sorted(unseen):
        yield f"{path}, {name}: missing"
    expected = list(zip(index.document_ids, index.document_tokens, strict=False))
    if not unseen and documents != expected:
        pairs = zip(documents, expected, strict=False)
        both = min(len(documents), len(expected))
        first = next((i for i, (document, promised) in enumerate(pairs) if document != promised), both)
        yield f"{path}: {len(documents)} documents, the index says {len(expected)}; they differ from number {first} on"


def _block(
    manifest: Manifest, block: Block, parts: dict[str, bytes], end: int, documents: list[tuple[Any, Any]]
) -> Iterator[str]:
    """The defects of one block whose tokens end at byte `end`; appends its documents' (id, tokens) to `documents`."""
    try:
        ids = decode_block(parts["npy"], manifest.numpy_dtype)
        about = json.loads(parts["json"])
        pairs = list(zip(about["ids"], about["tokens"], strict=True))
        if any(len(about[column]) != len(pairs) for column in ("paths", "urls") if column in about):
            raise ValueError(f"other numbers of paths or urls than the {len(pairs)} documents")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        yield f"not a block of documents ({e})"
        return
    documents += pairs
    if len(ids) != block.tokens:
        yield f"{len(ids)} tokens, the index says {block.tokens}"
    if end - ids.nbytes != block.offset:
        yield f"tokens from byte {end - ids.nbytes}, the index says {block.offset}"
    crc32 = zlib.crc32(ids.tobytes())
    if crc32 != block.crc32:
        yield f"crc32 {crc32:08x}, the index says {block.crc32:08x}"
    if ids.size and ids.max() >= manifest.vocab_size:
        yield f"token {ids.max()} in a vocabulary of {manifest.vocab_size}"
    lengths = [n for _, n in pairs]
    shortest = 0 if manifest.eot_id is None else 1
    if any(type(n) is not int or n < shortest for n in lengths) or sum(lengths) != len(ids):
        yield f"its documents' lengths {lengths[:5]} do not add up to its {len(ids)} tokens"
    elif manifest.eot_id is not None:
        ends = [end - 1 for end in accumulate(lengths)]
        broken = [name for (name, _), end in zip(pairs, ends, strict=True) if ids[end] != manifest.eot_id]
        if broken:
            yield f"document {broken[0]!r} does not end with token {manifest.eot_id}"

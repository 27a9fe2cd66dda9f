"""Small real sources for tests: the shard format written plainly, apart from the project's own writer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data_pipeline.files import rename
from data_pipeline.manifest import (
    TOKENIZER,
    Block,
    Manifest,
    ShardIndex,
    ShardInfo,
    index_path,
    write_index,
    write_manifest,
)


def make_source(
    root: Path,
    docs_per_shard: Sequence[Sequence[np.ndarray]],
    dtype: str = "uint16",
    *,
    vocab_size: int = 50257,
    eot_id: int | None = None,
    block_tokens: int = 64,
    split: str = "train",
) -> Manifest:
    """Write one tar, one index for each list of documents, and the manifest.

    `docs_per_shard[s][d]` is a document's token ids, [n], the end-of-text token included where there is one. A block is
    closed at the first document that fills `block_tokens`.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / TOKENIZER).write_text("{}")
    shards = tuple(_make_shard(root, s, docs, dtype, block_tokens) for s, docs in enumerate(docs_per_shard))
    sha = hashlib.sha256(b"{}").hexdigest()
    manifest = Manifest(root, "test", split, dtype, vocab_size, eot_id, sha, tuple(info for info, _ in shards))
    for info, index in shards:
        write_index(index_path(manifest, info), index)
    write_manifest(manifest)
    return manifest


def random_source(root: Path, shard_tokens: Sequence[int], dtype: str = "uint16", seed: int = 0) -> Manifest:
    """A source with these many random tokens in each shard, in documents of 1 to 40 tokens."""
    rng = np.random.default_rng(seed)
    shards = []
    for total in shard_tokens:
        cuts = np.cumsum(rng.integers(1, 41, size=total + 1))
        shards.append(np.split(rng.integers(0, 50257, size=total), cuts[cuts < total]) if total else [])
    return make_source(root, shards, dtype)


def _make_shard(
    root: Path, number: int, docs: Sequence[np.ndarray], dtype: str, block_tokens: int
) -> tuple[ShardInfo, ShardIndex]:
    from webdataset import TarWriter

    docs = [np.asarray(d).astype(np.dtype(dtype).newbyteorder("<")) for d in docs]
    groups: list[list[int]] = [[]]
    for d in range(len(docs)):
        groups[-1].append(d)
        if sum(len(docs[i]) for i in groups[-1]) >= block_tokens:
            groups.append([])
    path, arrays = root / f"{number:05d}.tar", []
    with TarWriter(str(path), mtime=0, encoder=False) as tar:
        for b, group in enumerate(g for g in groups if g):
            array, npy = np.concatenate([docs[i] for i in group]), io.BytesIO()
            np.save(npy, array)
            about = {"source": "test", "ids": [f"{number}-{i}" for i in group], "tokens": [len(docs[i]) for i in group]}
            tar.write({"__key__": f"{b:06d}", "npy": npy.getvalue(), "json": json.dumps(about).encode()})
            arrays.append(array)
    with tarfile.open(path) as tar:
        ends = [(m.name, m.offset_data + m.size) for m in tar if m.name.endswith(".npy")]
    blocks = [
        Block(name, len(array), zlib.crc32(array.tobytes()), end - array.nbytes)
        for array, (name, end) in zip(arrays, ends, strict=True)
    ]
    raw, lengths = path.read_bytes(), tuple(len(d) for d in docs)
    info = ShardInfo(path.name, len(raw), hashlib.sha256(raw).hexdigest(), len(docs), sum(lengths))
    return info, ShardIndex(tuple(blocks), tuple(f"{number}-{i}" for i in range(len(docs))), lengths, info.sha256)


def forestalled(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Callable[[int], None]:
    """Lets `modules` publish as often as is said, and stops the next publication as a kill would; -1: never."""
    left = -1

    def stop_after(publications: int) -> None:
        nonlocal left
        left = publications

    def publish(aside: Path, path: Path) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        rename(aside, path)

    for module in modules:
        monkeypatch.setattr(module, "rename", publish)
    return stop_after

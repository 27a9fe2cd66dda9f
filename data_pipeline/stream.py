"""Reading the windows that the plan asks for, each block checked as it arrives.

A rank holds the shards its lanes are in as plain arrays of tokens; a window is a slice of one. webdataset opens a shard
(its `gopen`). Its tar iterator is not used: it takes each member whole, whatever size it claims, and unpacks what is
compressed, so that a crafted tar could fill the memory; here a member's bytes go straight to their place in the array.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data_pipeline.config import UserError
from data_pipeline.manifest import Block, Manifest, ShardInfo, index_path, read_index

_NPY_HEADER = 4096  # bytes at most; numpy writes 128


class ShardError(UserError):
    """A shard that does not hold what its manifest says. Names the shard and, where there is one, the sample."""


def shard_windows(manifest: Manifest, n_ctx: int) -> np.ndarray:
    """How many windows each shard holds, in the manifest's order: [shards] int64.

    Raises:
        UserError: a source without a single window.
    """
    windows = np.array([shard.windows(n_ctx) for shard in manifest.shards], dtype=np.int64)
    if not windows.sum():
        most = max((shard.tokens for shard in manifest.shards), default=0)
        raise UserError(
            f"{manifest.root}: {manifest.tokens} tokens in {len(manifest.shards)} shards, at most {most} in one, hold "
            f"no window of model.n_ctx={n_ctx} + 1 tokens: give more text, a smaller n_ctx or larger shards"
        )
    return windows


class ShardStream:
    """Windows of one source.

    Args:
        open_shards: decoded shards kept from one call to the next, those used last; a rank needs one for each of its
            lanes. During a call, all that it touches are held.
    """

    def __init__(self, manifest: Manifest, n_ctx: int, open_shards: int = 1) -> None:
        self.manifest, self.n_ctx, self.open_shards = manifest, n_ctx, open_shards
        self._open: dict[int, np.ndarray] = {}  # shard number -> [windows, n_ctx + 1], a view; last used last

    def windows(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Tokens of the windows (shards[i], indices[i]): [n, n_ctx + 1] in the manifest's dtype.

        Raises:
            ShardError: a shard that is missing, truncated, replaced or damaged.
        """
        out = np.empty((len(shards), self.n_ctx + 1), dtype=self.manifest.numpy_dtype)
        last_row = {int(shard): row for row, shard in enumerate(shards)}
        for shard in sorted(last_row, key=last_row.__getitem__):
            rows = np.flatnonzero(shards == shard)
            windows = self._open.pop(shard, None)
            if windows is None:
                tokens = read_shard(self.manifest, self.manifest.shards[shard])
                windows = sliding_window_view(tokens, self.n_ctx + 1)[:: self.n_ctx]
            self._open[shard] = windows
            out[rows] = windows[indices[rows]]
        for shard in list(self._open)[: -self.open_shards]:
            del self._open[shard]
        return out


def read_shard(manifest: Manifest, shard: ShardInfo) -> np.ndarray:
    """All tokens of a shard: [tokens] in the manifest's dtype.

    Raises:
        ShardError: the shard is missing, truncated, replaced or damaged.
    """
    if Path(shard.name).name != shard.name:
        raise ShardError(f"{manifest.root}: shard {shard.name!r} is not the name of a file in that folder")
    path = (manifest.root / shard.name).absolute()  # gopen runs a path that starts with "pipe:"
    blocks, dtype = read_index(index_path(manifest, shard)).blocks, manifest.numpy_dtype
    _check_size(path, shard, manifest)
    counts = [block.tokens for block in blocks]
    if not all(type(n) is int for n in counts) or sum(counts) != shard.tokens:
        raise ShardError(f"{path}: its index counts other tokens than the manifest's {shard.tokens}: {_cure(manifest)}")
    if shard.tokens * dtype.itemsize > shard.bytes:
        raise ShardError(
            f"{path}: {shard.bytes} bytes cannot hold the manifest's {shard.tokens} tokens: {_cure(manifest)}"
        )
    from webdataset.gopen import gopen  # brings torch along: only where shards are read

    tokens, filled, member = np.empty(shard.tokens, dtype), 0, "(none)"
    try:
        with gopen(str(path)) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            members = iter(tar)
            for block in blocks:
                member = block.member
                _read_block(members, f, block, tokens[filled : filled + block.tokens])
                filled += block.tokens
    except (OSError, ValueError, tarfile.TarError) as e:
        raise ShardError(f"{path}: sample {member}: {e}: {_cure(manifest)}") from None
    return tokens


def _check_size(path: Path, shard: ShardInfo, manifest: Manifest) -> None:
    try:
        size = path.stat().st_size
    except OSError as e:
        raise ShardError(f"{path}: {e.strerror}: {_cure(manifest)}") from None
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "replaced"
        raise ShardError(f"{path}: {what}, {size} bytes where the manifest says {shard.bytes}: {_cure(manifest)}")


def _read_block(members: Iterator[tarfile.TarInfo], f: BinaryIO, block: Block, tokens: np.ndarray) -> None:
    """Fill `tokens`, [block.tokens], from its member. Raises ValueError for what differs from the index.

    The member's own header is not parsed: dtype and length are the index's, and the checksum holds the bytes to them.
    """
    member = next((m for m in members if m.name == block.member), None)
    if member is None:
        raise ValueError("missing")
    header = member.size - tokens.nbytes
    if len(tokens) != block.tokens or not member.isreg() or not 0 <= header <= _NPY_HEADER:
        raise ValueError(f"{member.size} bytes, which are not the {block.tokens} tokens of the index")
    f.seek(member.offset_data + header)
    f.readinto(tokens.data)  # type: ignore[attr-defined]
    if (found := zlib.crc32(tokens.data)) != block.crc32:
        raise ValueError(f"checksum {found:08x} where the index says {block.crc32:08x}")


def _cure(manifest: Manifest) -> str:
    return f"restore it, and check the others with `python -m data_pipeline.shards verify path={manifest.root}`"

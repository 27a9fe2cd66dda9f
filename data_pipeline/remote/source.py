"""Opening of sources and shard indexes, local or remote through the cache of the node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from conf.errors import TransientError, UserError, may_pass
from data_pipeline.config import DataConfig
from data_pipeline.manifest import MANIFEST, Manifest, ShardIndex, ShardInfo, index_of, read_manifest
from data_pipeline.remote.backends import Lost, Unreachable, is_remote, refuse_password, shown
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.cached_shard import CachedShard
from data_pipeline.remote.mirror import NoSource, has_manifest, mirror


class ShardError(UserError):
    """A shard that cannot be read. Names the shard and, if known, the sample."""


class LostShard(ShardError):
    """A shard that is lost for good: missing, truncated, replaced or damaged, also in a second read.

    `source` is its source's number in the stream, `shard` its number in that source.
    """

    def __init__(self, message: str, source: int, shard: int) -> None:
        super().__init__(message)
        self.source = source
        self.shard = shard


class UnreachableShard(ShardError, TransientError):
    """A shard that cannot be read now: no answer, or this machine lacks files, memory or a working disk."""


def open_source(path: str | Path, cache: Cache | None) -> Manifest:
    """The manifest of a source: a local folder, or a URL or pipe of `backends.py`, then through the cache.

    Raises:
        NoSource: there is no source.
        UserError: the source is damaged or cannot be reached, or it is remote and there is no cache.
    """
    if is_remote(str(path)):
        refuse_password(str(path))
        if cache is None:
            raise UserError(f"{shown(str(path))}: not a local folder: give data.cache.dir=FOLDER on each node's disk")
        return mirror(str(path), cache)
    try:
        return read_manifest(path)
    except TransientError:
        raise
    except UserError as e:
        raise (e if (Path(path) / MANIFEST).exists() else NoSource(str(e))) from None


def open_cache(cfg: DataConfig) -> Cache | None:
    """The cache of the config; None without data.cache.dir."""
    return Cache(cfg.cache, cfg.fetch, cfg.allow_pipe) if cfg.cache.dir is not None else None


def index_at(manifest: Manifest, number: int, cache: Cache | None) -> ShardIndex:
    """The index of a shard, local or remote.

    Raises:
        ShardError: the index is missing, damaged or another shard's.
    """
    shard = manifest.shards[number]
    with shard_errors(manifest, shard, cache, 0, number):
        if manifest.origin is None:
            return index_of(manifest, shard)
        assert cache is not None
        with closing(CachedShard(cache, manifest, shard, tokens=False)) as cached:
            return cached.index


@contextmanager
def shard_errors(manifest: Manifest, shard: ShardInfo, cache: Cache | None, source: int, number: int) -> Iterator[None]:
    """Turn errors of reading a shard into ShardErrors, which name the shard and a cure."""
    if Path(shard.name).name != shard.name:
        raise ShardError(f"{manifest.root}: shard {shard.name!r} is not the name of a file in that folder")
    disk = ""
    if manifest.origin is None or cache is None:
        location = str((manifest.root / shard.name).absolute())
        cure = f"restore it, and check the others with `python -m data_pipeline.shards verify path={manifest.root}`"
    else:
        url = cache.backend(manifest.origin).url
        location = url.replace("{}", shard.name) if "{}" in url else f"{url}/{shard.name}"
        disk = f": data.cache.dir={cache.dir}"
        cure = "restore it there, or go on without it (data.on_bad_shard=skip)"
    try:
        yield
    except Lost as e:
        if not has_manifest(manifest, cache):
            raise UnreachableShard(
                f"{location}: {e}, and the source's {MANIFEST} is missing too: restore it, then resume"
            ) from None
        raise LostShard(f"{location}: {e}: {cure}", source, number) from None
    except Unreachable as e:
        raise UnreachableShard(
            f"{location}: {e}: fix the connection or give other data.fetch.retries and timeout_s, then resume"
        ) from None
    except MemoryError:
        raise UnreachableShard(
            f"{location}: its {shard.tokens} tokens need more memory than this machine has left: fewer data.lanes a "
            f"rank hold fewer shards"
        ) from None
    except OSError as e:
        file = f" ({e.filename})" if e.filename else ""
        kind = UnreachableShard if may_pass(e) else ShardError
        raise kind(f"{location}{disk}: {e.strerror or e}{file}: fix it, then resume") from None

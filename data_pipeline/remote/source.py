"""Opening of sources and shard indexes, local or remote through the cache of the node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from conf.errors import TransientError, UserError
from data_pipeline.config import DataConfig
from data_pipeline.manifest import MANIFEST, Manifest, ShardIndex, ShardInfo, index_of, read_manifest
from data_pipeline.remote.backends import Lost, Unreachable, is_remote, refuse_password, shown
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.cached_shard import Entry, NoSource, is_there, mirror


class ShardError(UserError):
    """A shard that cannot be read. Names the shard and, where there is one, the sample."""


class LostShard(ShardError):
    """A shard that is lost for good: gone, truncated, replaced or damaged, and no better when read again.

    `source` is its source's number in the stream, `shard` its number in that source.
    """

    def __init__(self, message: str, source: int, shard: int) -> None:
        super().__init__(message)
        self.source, self.shard = source, shard


class UnreachableShard(ShardError, TransientError):
    """A shard that cannot be read now: no answer, or this machine is short of files, memory or a disk that works."""


def open_source(path: str | Path, cache: Cache | None) -> Manifest:
    """The manifest of a source: a folder, or what `data_pipeline/remote/backends.py` knows (then through the cache).

    Raises:
        NoSource: there is none.
        UserError: it is damaged or cannot be reached; a source afar and no cache.
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
    """The cache that the config names, if it names one."""
    return Cache(cfg.cache, cfg.fetch) if cfg.cache.dir is not None else None


def index_at(manifest: Manifest, number: int, cache: Cache | None) -> ShardIndex:
    """The index of a shard, wherever it lies.

    Raises:
        ShardError: it is missing, damaged or another shard's.
    """
    shard = manifest.shards[number]
    with _named(manifest, shard, cache, 0, number):
        if manifest.origin is None:
            return index_of(manifest, shard)
        assert cache is not None
        with closing(Entry(cache, manifest, shard, tokens=False)) as entry:
            return entry.index


@contextmanager
def _named(manifest: Manifest, shard: ShardInfo, cache: Cache | None, source: int, number: int) -> Iterator[None]:
    """What goes wrong with a shard, as an error that names it and says what to do."""
    if Path(shard.name).name != shard.name:
        raise ShardError(f"{manifest.root}: shard {shard.name!r} is not the name of a file in that folder")
    afar = None if manifest.origin is None else cache
    if manifest.origin is None or cache is None:
        where = str((manifest.root / shard.name).absolute())
        cure = f"restore it, and check the others with `python -m data_pipeline.shards verify path={manifest.root}`"
    else:
        url = cache.place(manifest.origin).url
        where = url.replace("{}", shard.name) if "{}" in url else f"{url}/{shard.name}"
        cure = "restore it there, or go on without it (data.on_bad_shard=skip)"
    try:
        yield
    except Lost as e:
        if not is_there(manifest, cache):
            raise UnreachableShard(
                f"{where}: {e}, and the source's {MANIFEST} is not there either: restore it, then resume"
            ) from None
        raise LostShard(f"{where}: {e}: {cure}", source, number) from None
    except Unreachable as e:
        raise UnreachableShard(
            f"{where}: {e}: mend the way there or give other data.fetch.retries and timeout_s, then resume"
        ) from None
    except MemoryError:
        raise UnreachableShard(
            f"{where}: its {shard.tokens} tokens are more than the memory of this machine has left: fewer data.lanes "
            f"a rank hold fewer shards"
        ) from None
    except OSError as e:
        blamed = where if afar is None else f"{where}: data.cache.dir={afar.dir}"
        at = f" ({e.filename})" if e.filename else ""
        raise UnreachableShard(f"{blamed}: {e.strerror or e}{at}: mend it, then resume") from None

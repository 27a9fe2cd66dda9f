"""Remote sources: their small files are copied into the cache, their shards are not."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import partial

from conf.errors import TransientError, UserError
from data_pipeline.files import JSON_LIMIT, publish
from data_pipeline.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest
from data_pipeline.remote.backends import Lost, Unreachable
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.fetch import fetch_small


class NoSource(UserError):
    """A folder or URL that can be read and holds no manifest."""


def mirror(url: str, cache: Cache) -> Manifest:
    """The manifest of a remote source: its small files are copied to `root`, its shards stay at `origin`.

    Raises:
        UserError: the source cannot be reached, or there is none.
    """
    backend = cache.backend(url)
    try:
        body = fetch_small(backend, MANIFEST, JSON_LIMIT, cache.fetch)
        root = cache.dir / "sources" / hashlib.sha256(url.encode() + b"\0" + body).hexdigest()[:32]
        cache.writing(lambda: root.mkdir(exist_ok=True))
        cache.writing(partial(publish, root / MANIFEST, body))
        manifest = replace(read_manifest(root), origin=url)
        path, sha256 = root / TOKENIZER, manifest.tokenizer_sha256
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            body = fetch_small(backend, TOKENIZER, JSON_LIMIT, cache.fetch)
            if (fetched := hashlib.sha256(body).hexdigest()) != sha256:
                raise UserError(f"{backend.url}: {TOKENIZER} has sha256 {fetched}, the manifest says {sha256}")
            cache.writing(partial(publish, path, body))
    except Lost as e:
        raise NoSource(f"{backend.url}: {e}: no source there; give what `shards write` made, manifest last") from None
    except Unreachable as e:
        raise TransientError(f"{backend.url}: {e}: fix it, or give other data.fetch.retries and timeout_s") from None
    return manifest


def has_manifest(manifest: Manifest, cache: Cache | None) -> bool:
    """The source still has its manifest, so a missing shard is missing alone."""
    if manifest.origin is None or cache is None:
        return os.access(manifest.root / MANIFEST, os.F_OK)  # False also if the folder is not readable
    try:
        fetch_small(cache.backend(manifest.origin), MANIFEST, JSON_LIMIT, cache.fetch)
    except (Lost, Unreachable):
        return False
    return True

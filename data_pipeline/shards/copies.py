"""Copies of the files of a remote source, for a check that reads local files: small files, then shard after shard."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from conf.errors import TransientError, UserError
from data_pipeline.config import FetchConfig
from data_pipeline.files import JSON_LIMIT
from data_pipeline.manifest import MANIFEST, REPORT, SPLITS, TOKENIZER, Manifest, ShardInfo, index_name, read_manifest
from data_pipeline.remote.backends import Lost, Unreachable, backend_of, listing, refuse_password, shown
from data_pipeline.remote.fetch import fetch_small


@contextmanager
def small_files(url: str) -> Iterator[Path]:
    """A temporary folder with the manifests, tokenizers and reports at `url`, and one folder below it.

    Raises:
        UserError: an address with a password, a command, an unknown protocol.
        TransientError: the place does not answer.
    """
    if url.startswith("pipe:"):
        raise UserError(f"path={shown(url)}: give a folder or a URL: a command does not say which sources it has")
    refuse_password(url)
    with tempfile.TemporaryDirectory() as made:
        for folder in ("", *SPLITS):
            (Path(made) / folder).mkdir(exist_ok=True)
            for name in (MANIFEST, TOKENIZER, REPORT):
                with suppress(Lost):
                    _copy(_below(url, folder), name, JSON_LIMIT, Path(made) / folder)
        yield Path(made)


def manifest_of_copy(url: str, copies: Path, folder: Path) -> Manifest:
    """The manifest in a folder of `copies`, with the URL that its shards come from."""
    return replace(read_manifest(folder), origin=_below(url, "" if folder == copies else folder.name))


def names_at(url: str) -> list[str]:
    """The names of the files of a remote folder; none of http(s), which lists nothing.

    Raises:
        TransientError: the place does not answer.
    """
    if url.startswith(("http://", "https://")):
        return []
    try:
        return [path.rpartition("/")[2] for path, _ in listing(url)]
    except Unreachable as e:
        raise TransientError(f"{shown(url)}: {e}") from None


@contextmanager
def at_hand(manifest: Manifest, shard: ShardInfo) -> Iterator[tuple[Manifest, list[str]]]:
    """The manifest in the folder where the shard's files are, for as long as the context lasts, and why one is not."""
    if manifest.origin is None:
        yield manifest, []
        return
    with tempfile.TemporaryDirectory() as made:
        missing = []
        for name, limit in {shard.name: shard.bytes + 1, index_name(shard.name): JSON_LIMIT}.items():
            try:
                _copy(manifest.origin, name, limit, Path(made))
            except Lost as e:
                missing.append(f"{made}/{name}: {e}")
        yield replace(manifest, root=Path(made)), missing


def _copy(url: str, name: str, limit: int, folder: Path) -> None:
    fetch = FetchConfig()
    try:
        body = fetch_small(backend_of(url, fetch), name, limit, fetch)
    except Unreachable as e:
        raise TransientError(f"{shown(url)}/{name}: {e}") from None
    with (folder / name).open("xb") as file:
        file.write(body)


def _below(url: str, folder: str) -> str:
    path, mark, query = url.partition("?")
    return f"{path.rstrip('/')}/{folder}{mark}{query}" if folder else url

"""Inputs at http(s)://, s3://, gs:// and the other protocols of fsspec: each is fetched whole, once, and before it is
read, so that a truncated or missing file is detected before its first document.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote

from conf.errors import TransientError, UserError
from data_pipeline.config import FetchConfig
from data_pipeline.corpus.inputs import Input, files_at
from data_pipeline.files import rename
from data_pipeline.remote.backends import (
    Backend,
    Corrupt,
    Lost,
    Unreachable,
    backend_of,
    is_remote,
    listing,
    refuse_password,
    shown,
)
from data_pipeline.remote.fetch import Reader, retried

PIECE = 64 << 20  # bytes of one request
ENDING = 100  # last characters of a name, which its copy keeps: they give the format


def inputs_at(url: str, key: str = "input") -> list[Input]:
    """files_at for a path or a URL: of http(s) one file, of the others also a folder or a glob. Perhaps none.

    Raises:
        UserError, TransientError: an unknown protocol, nothing at that address, or a server that does not answer.
    """
    if not is_remote(url):
        return files_at(url, key)
    if url.startswith("pipe:"):
        raise UserError(f"{key}={shown(url)}: give a path or a URL: a command does not say which files it has")
    refuse_password(url)
    if url.startswith(("http://", "https://")):
        name = PurePosixPath(unquote(url.partition("?")[0].rpartition("/")[2])).name
        if not name:
            raise UserError(f"{key}={shown(url)}: names no file: of http(s) give the URL of one file")
        return [Input(Path(name), name, 0, 0, url)]
    try:
        files = listing(url)
    except Unreachable as e:
        raise TransientError(f"{key}={shown(url)}: {e}") from None
    folders = [url.split("/")[:-1] for url, _ in files]
    same = 0  # leading folders that all files share, which their names leave out
    while folders and all(len(f) > same and f[same] == folders[0][same] for f in folders):
        same += 1
    names = ["/".join(url.split("/")[same:]) for url, _ in files]
    return [Input(Path(name), name, size, 0, url) for name, (url, size) in zip(names, files, strict=True)]


def fetched(file: Input, folder: Path, fetch: FetchConfig | None = None) -> Input:
    """The file on this machine: itself, or its whole copy in `folder`, named by a hash of its URL and its own ending.

    A copy that a killed fetch left unfinished is fetched again: the file may have changed since.

    Raises:
        UserError, TransientError: it is missing, its size differs from the listed one, it changed during the fetch, or
            the server does not answer.
    """
    if file.url is None:
        return file
    fetch = fetch or FetchConfig()
    http = file.url.startswith(("http://", "https://"))
    path, mark, query = file.url.partition("?") if http else (file.url, "", "")  # of the others ? may be in a name
    base, _, name = path.rpartition("/")
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", unquote(name) if http else name)[-ENDING:]
    target = folder / f"{hashlib.sha256(file.url.encode()).hexdigest()[:16]}-{plain}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("ab") as out:
                fcntl.flock(out, fcntl.LOCK_EX)  # another task may want the same file
                if not target.exists():
                    _pull(backend_of(base + mark + query, fetch), name, None if http else file.size, out, fetch)
                    rename(part, target)
        except (Lost, Corrupt) as e:
            raise UserError(f"{shown(file.url)}: {e}") from None
        except Unreachable as e:
            raise TransientError(f"{shown(file.url)}: {e}") from None
    about = target.stat()
    return Input(target, file.name, about.st_size, file.mtime_ns)


def _pull(source: Backend, name: str, size: int | None, out: IO[bytes], fetch: FetchConfig) -> None:
    """Fetch one version of the file into `out`: of a known size in one stream, else (http) in pieces, compared."""
    first: tuple[int | None, str] | None = None

    def piece() -> int | None:
        nonlocal first
        if first is None or size is not None:
            out.seek(0)
            out.truncate()
        start, length = out.tell(), PIECE if size is None else None
        with Reader(source, name, start, length, fetch.timeout_s, plain=False) as reader:
            if first not in (None, (reader.total, reader.version)):
                raise Corrupt("it changed while it was fetched: run the same command again")
            first = reader.total, reader.version
            reader.skip(start - reader.start)
            while (chunk := reader.take(1 << 20)) and (size is None or out.tell() <= size):
                out.write(chunk)
            return reader.total if size is None else size

    while (total := retried(piece, fetch)) is not None and size is None and out.tell() < total:
        pass
    if out.tell() != total:
        raise Lost(f"{out.tell()} bytes came of {'a size that is not said' if total is None else total}")
    out.flush()
    os.fsync(out.fileno())

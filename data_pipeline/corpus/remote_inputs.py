"""Inputs that lie elsewhere, by http(s)://, s3://, gs:// and what else fsspec knows: each is fetched whole, once, and
before it is read, so that what is cut or lost is known before its first document.
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
    Lost,
    Place,
    Unreachable,
    Wrong,
    is_remote,
    listing,
    place,
    refuse_password,
    shown,
)
from data_pipeline.remote.fetch import Reader, retried

PIECE = 64 << 20  # bytes that are asked for at a time
ENDING = 100  # characters of a name that its copy keeps, the last ones: they say the format


def inputs_at(where: str, key: str = "input") -> list[Input]:
    """files_at for a path or a URL: of http(s) one file, of the others also a folder or a glob. Perhaps none.

    Raises:
        UserError, TransientError: the place is of no known kind, is not there, or does not answer.
    """
    if not is_remote(where):
        return files_at(where, key)
    if where.startswith("pipe:"):
        raise UserError(f"{key}={shown(where)}: give a path or a URL: a command does not say which files it has")
    refuse_password(where)
    if where.startswith(("http://", "https://")):
        name = PurePosixPath(unquote(where.partition("?")[0].rpartition("/")[2])).name
        if not name:
            raise UserError(f"{key}={shown(where)}: names no file: of http(s) give the URL of one file")
        return [Input(Path(name), name, 0, 0, where)]
    try:
        found = listing(where)
    except Unreachable as e:
        raise TransientError(f"{key}={shown(where)}: {e}") from None
    folders = [url.split("/")[:-1] for url, _ in found]
    same = 0  # folders that all lie in, which their names leave out
    while folders and all(len(f) > same and f[same] == folders[0][same] for f in folders):
        same += 1
    names = ["/".join(url.split("/")[same:]) for url, _ in found]
    return [Input(Path(name), name, size, 0, url) for name, (url, size) in zip(names, found, strict=True)]


def fetched(file: Input, folder: Path, fetch: FetchConfig | None = None) -> Input:
    """The file on this machine: itself, or its copy in `folder`, whole, named by a hash of its URL and its own ending.

    What a killed fetch left is fetched anew: the file may be another one by now.

    Raises:
        UserError, TransientError: it is not there, its size is not what the place says, it changed meanwhile, or the
            place
            does not answer.
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
                    _pull(place(base + mark + query, fetch), name, None if http else file.size, out, fetch)
                    rename(part, target)
        except (Lost, Wrong) as e:
            raise UserError(f"{shown(file.url)}: {e}") from None
        except Unreachable as e:
            raise TransientError(f"{shown(file.url)}: {e}") from None
    about = target.stat()
    return Input(target, file.name, about.st_size, file.mtime_ns)


def _pull(there: Place, name: str, size: int | None, out: IO[bytes], fetch: FetchConfig) -> None:
    """The file into `out`, all of one version: of a known size in one stream, else (http) in pieces, compared."""
    first: tuple[int | None, str] | None = None

    def piece() -> int | None:
        nonlocal first
        if first is None or size is not None:
            out.seek(0)
            out.truncate()
        at, length = out.tell(), PIECE if size is None else None
        with Reader(there, name, at, length, fetch.timeout_s, plain=False) as reader:
            if first not in (None, (reader.total, reader.version)):
                raise Wrong("it changed while it was fetched: run the same command again")
            first = reader.total, reader.version
            reader.skip(at - reader.start)
            while (chunk := reader.take(1 << 20)) and (size is None or out.tell() <= size):
                out.write(chunk)
            return reader.total if size is None else size

    while (total := retried(piece, fetch)) is not None and size is None and out.tell() < total:
        pass
    if out.tell() != total:
        raise Lost(f"{out.tell()} bytes came of {'a size that is not said' if total is None else total}")
    out.flush()
    os.fsync(out.fileno())

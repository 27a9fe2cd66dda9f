"""The input files that a path of a config names: a file, a folder searched through, or a glob."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.errors import UserError


@dataclass(frozen=True, slots=True)
class Input:
    """One file of the corpus; `name` is its path relative to the corpus.

    A file with a `url` must be fetched before it is read (data_pipeline/corpus/remote_inputs.py); its size is 0 if the
    listing does not give it.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    url: str | None = None


def files_at(path: str, key: str = "corpus.path") -> list[Input]:
    """The regular files at `path`, sorted by name, perhaps none; hidden files and folders are left out.

    Raises:
        UserError: no such path, or a folder that cannot be read; names the config's `key`.
    """
    return listed(*_find(path, key))


def listed(root: Path, paths: Iterable[Path]) -> list[Input]:
    """The files `paths` below `root` as inputs, sorted by name; a name that is no Unicode is escaped."""
    stats = [(path, path.stat()) for path in paths]
    names = [os.fsencode(p.relative_to(root)).decode(errors="backslashreplace") for p, _ in stats]
    inputs = [Input(p, name, s.st_size, s.st_mtime_ns) for name, (p, s) in zip(names, stats, strict=True)]
    return sorted(inputs, key=lambda i: i.name)


def _find(pattern: str, key: str) -> tuple[Path, list[Path]]:
    path = Path(pattern)
    if path.is_dir():
        return path, [p for p in _walk(path, key) if p.is_file()]
    if path.is_file():
        return path.parent, [path]
    if not glob.has_magic(pattern):
        raise UserError(f"{key}={pattern}: no such file or folder")
    fixed = next(p for p in path.parents if not glob.has_magic(str(p)))
    paths = fixed.glob(str(path.relative_to(fixed)))
    return fixed, [p for p in paths if p.is_file() and not any(_hidden(part) for part in p.relative_to(fixed).parts)]


def _walk(top: Path, key: str) -> Iterator[Path]:
    """The files in a folder and below it. Links to folders are followed, and each folder is read once.

    Raises:
        UserError: a folder that cannot be read.
    """

    def refuse(e: OSError) -> None:
        raise UserError(f"{key}={top}: {e.filename}: {e.strerror}: make it readable, or name another path")

    seen = set()
    for folder, below, names in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not _hidden(name))
        yield from (Path(folder) / name for name in names if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".")

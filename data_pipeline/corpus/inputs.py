"""The files that a path of a config stands for (a file, a folder searched through, a glob), and what comes of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.errors import UserError


@dataclass(frozen=True, slots=True)
class Input:
    """One file of the corpus; `name` is its path relative to the corpus. One with a `url` must be fetched before it is
    read (data_pipeline/corpus/remote_inputs.py), and its size is 0 where the place does not list it."""

    path: Path
    name: str
    size: int
    mtime_ns: int
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """`id`, `path` and `source` (the corpus) say where `text` came from; paths are relative to the corpus."""

    id: str
    text: str
    source: str
    path: str
    url: str | None = None
    date: str | None = None  # as the input spells it


def files_at(where: str, key: str = "corpus.path") -> list[Input]:
    """The regular files at `where`, sorted by name; hidden ones and hidden folders are left alone. Perhaps none.

    Raises:
        UserError: no such path, or a folder that cannot be read; names the config's `key`.
    """
    return listed(*_find(where, key))


def listed(root: Path, paths: Iterable[Path]) -> list[Input]:
    stats = [(path, path.stat()) for path in paths]
    names = [os.fsencode(p.relative_to(root)).decode(errors="backslashreplace") for p, _ in stats]  # may be no Unicode
    found = [Input(p, name, s.st_size, s.st_mtime_ns) for name, (p, s) in zip(names, stats, strict=True)]
    return sorted(found, key=lambda i: i.name)


def _find(where: str, key: str) -> tuple[Path, list[Path]]:
    path = Path(where)
    if path.is_dir():
        return path, [p for p in _walk(path, key) if p.is_file()]
    if path.is_file():
        return path.parent, [path]
    if not glob.has_magic(where):
        raise UserError(f"{key}={where}: no such file or folder")
    fixed = next(p for p in path.parents if not glob.has_magic(str(p)))
    found = fixed.glob(str(path.relative_to(fixed)))
    return fixed, [p for p in found if p.is_file() and not any(_hidden(part) for part in p.relative_to(fixed).parts)]


def _walk(top: Path, key: str) -> Iterator[Path]:
    """What is in a folder and below, links to folders followed; each folder is entered once, whatever leads there.

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

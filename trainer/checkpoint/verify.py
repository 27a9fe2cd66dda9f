"""A checkpoint's files compared with its manifest, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.files import read_json
from trainer.run.folder import DAMAGED, STATE

FORMAT = 1
INDEX = "index.json"
MANIFEST = "manifest.json"
Files = dict[str, dict[str, Any]]  # name: {"bytes", "sha256"}


class DamagedError(UserError):
    """A checkpoint that is not what was written. Another one may be whole."""


def check_files(path: Path) -> Files:
    """The manifest's files, each there with the size it should have.

    Raises:
        DamagedError: naming what is missing, too short or too long.
        UserError: the checkpoint is of a newer version's format, or this machine may not read it.
    """
    try:
        body = read_json(path / MANIFEST, DAMAGED)
    except UserError as e:
        if isinstance(e.__cause__, OSError):  # says nothing of what was written
            raise
        raise DamagedError(str(e)) from None
    check_format(path / MANIFEST, body.get("format"))
    try:
        files = {
            file_name(name): {"bytes": int(i["bytes"]), "sha256": str(i["sha256"])} for name, i in body["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DamagedError(f"{path / MANIFEST}: damaged ({e!r}): use another checkpoint") from None
    if not {STATE, INDEX} <= files.keys():
        raise DamagedError(f"{path / MANIFEST}: names no {STATE} or no {INDEX}: use another checkpoint")
    for name, info in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != info["bytes"]:
            problem = "is missing" if size is None else f"has {size} bytes, not {info['bytes']}"
            raise DamagedError(f"{file} {problem}: the checkpoint is damaged, use another one")
    return files


def verify(path: Path, files: Files, names: Iterable[str]) -> None:
    """Raises DamagedError naming the first file whose bytes are not those that were written."""
    for name in names:
        with (path / name).open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != files[name]["sha256"]:
                raise DamagedError(
                    f"{path / name}: its sha256 is not the manifest's: the file is damaged, use another checkpoint"
                )


def check_format(file: Path, number: Any) -> None:
    """Raises UserError for the format of a newer version, DamagedError for none."""
    if type(number) is int and number > FORMAT:
        raise UserError(
            f"{file}: made by a newer version of Gradus (format {number}, this one reads {FORMAT}): start that "
            "version, or give another run.name"
        )
    if number != FORMAT:
        raise DamagedError(f"{file}: damaged: format {number!r}, not {FORMAT}: use another checkpoint")


def file_name(value: Any) -> str:
    """A file name that stays inside its folder."""
    if not isinstance(value, str) or Path(value).name != value or value.startswith("."):
        raise ValueError(f"{value!r} is not a file name")
    return value

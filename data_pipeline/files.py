"""Files that are published whole or not at all, and JSON of bounded size that is checked against a dataclass."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, BinaryIO, TypeVar, get_args, get_origin, get_type_hints

from conf.errors import UserError, of_nature

T = TypeVar("T")
GIB = 2**30  # bytes
JSON_LIMIT = 256 << 20  # bytes of a manifest or an index: both are held whole


def check_output(path: str) -> None:
    """Raises UserError for an output that is no path of this machine: Path() would make a folder `s3:` of it."""
    if "://" in path or path.startswith("pipe:"):
        named = re.sub(r"//[^/]*@", "//", path) if "://" in path else "pipe:..."  # without possible secrets
        raise UserError(f"output={named}: give a path on this machine: nothing is written to a URL")


def publish_json(path: Path, body: dict[str, Any], *, private: bool = False) -> None:
    """Publish a JSON object, indented, as UTF-8."""
    publish(path, (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode(), private=private)


def publish(path: Path, data: bytes, *, durable: bool = True, private: bool = False) -> None:
    """Write a staging file and rename it: a reader sees the old file or the new one, never half of one.

    durable: fsync both steps, so that the new file also outlives a crash of the machine.
    private: for its owner alone (mode 0600).
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(staging, "wb", opener=lambda p, flags: os.open(p, flags, 0o600 if private else 0o666)) as f:
        f.write(data)
        if durable:
            f.flush()
            os.fsync(f.fileno())
    rename(staging, path) if durable else staging.replace(path)


def rename(staging: Path, path: Path) -> None:
    """Move a fsynced file to its name, and make the move itself durable."""
    staging.replace(path)
    fsync_folder(path.parent)


def own_folder(folder: Path, kind: str, knob: str) -> None:
    """Make a folder that may be cleaned later, or take one that was made for this: the file `.gradus-KIND` says so.

    Raises:
        UserError: the folder holds files and not that one: they are somebody's; ends in `knob`, what to give instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".gradus-{kind}"
    names = [path.name for path in folder.iterdir()]
    if marker.name not in names and names and not marker.exists():  # another process may just have made it
        raise UserError(f"{folder} holds files and no {marker.name}, so it is no {kind} of ours to clean: {knob}")
    with suppress(FileExistsError):
        marker.open("x").close()


def remove_unfinished(folder: Path, names: str) -> None:
    """Remove what killed publications of files `names` (a regular expression) have left in a folder, and no more."""
    ours = re.compile(rf"\.(?:{names})(?:\.\d+)?\.tmp")
    for path in folder.glob(".*.tmp"):
        if ours.fullmatch(path.name) and not path.is_dir():
            path.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(path: Path, cure: str) -> BinaryIO:
    """Open a file for reading if it is a regular one: a pipe or a device might make its reader wait for ever.

    Raises:
        UserError: it is none; the message ends in `cure`. OSError: it cannot be opened.
    """
    f = open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        return f
    f.close()
    raise UserError(f"{path}: not a regular file: {cure}")


def read_json(path: Path, cure: str, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read the JSON object in a regular file of at most `limit` bytes.

    Raises:
        UserError: no such file, none that may be read, too large, or no JSON object; the message ends in `cure`.
        TransientError: the file cannot be read now.
    """
    try:
        with open_regular(path, cure) as f:
            if (size := os.fstat(f.fileno()).st_size) > limit:
                raise UserError(f"{path}: {size} bytes, more than the {limit} that are read: {cure}")
            body = json.loads(f.read(size).decode())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise UserError(f"{path}: {(e.strerror or str(e)).lower()}: {cure}") from None
    except OSError as e:
        raise of_nature(e, f"{path}: {(e.strerror or str(e)).lower()}: fix it, then try again") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e}): {cure}") from None
    if not isinstance(body, dict):
        raise UserError(f"{path}: not a JSON object: {cure}")
    return body


def from_json(schema: type[T], body: Any, name: Path | str, cure: str, *, extra: bool = False, **given: Any) -> T:
    """Make a dataclass of a parsed JSON value, with the types that its fields declare and nothing converted.

    Fields may be int, float (an int is one too), str, bool, None, Any, unions with None, other dataclasses,
    `list[X]`, `tuple[X, ...]` and `dict[str, X]` (or Mapping). `Annotated[int, range(1, 9)]` bounds a number;
    `Annotated[str, re.compile("[a-z]+"), "a word"]` says what a whole text must match, and that in words. A ValueError
    or UserError of `__post_init__` is a complaint too.

    Args:
        name: the file, as messages name it.
        cure: what the user can do; ends each message.
        extra: leave out keys that the dataclass does not have, at every level, instead of refusing them.
        given: fields of `schema` that do not come from the file; the file may not name them.

    Raises:
        UserError: a key that is missing or not known, a value of another type or out of bounds; names file and field.
    """
    try:
        made: T = _object(schema, extra, tuple(given))(body, **given)
    except _DamagedValue as e:
        keys = ", ".join(key.lstrip(".") for key in e.keys) or "the whole"
        raise UserError(f"{name}: damaged ({keys}{e}): {cure}") from None
    except (ValueError, UserError) as e:
        raise UserError(f"{name}: damaged ({e}): {cure}") from None
    return made


class _DamagedValue(Exception):
    """A complaint about the values at `keys`, such as `.shards[3].bytes`; each level on the way up adds its part."""

    def __init__(self, complaint: str, *keys: str) -> None:
        super().__init__(complaint)
        self.keys = keys or ("",)


@cache
def _reader(hint: Any, extra: bool) -> Callable[[Any], Any]:
    """The function that turns a parsed JSON value into the type `hint`, or raises _DamagedValue."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if origin is Annotated:
        return _bounded(_reader(args[0], extra), args[1:])
    if NoneType in args:
        other = _reader(next(arg for arg in args if arg is not NoneType), extra)
        return lambda value: None if value is None else other(value)
    if is_dataclass(hint):
        return _object(hint, extra)
    if origin in (list, tuple):
        return _items(origin, args[0], extra)
    if origin in (dict, Mapping):
        item = _reader(args[1], extra)
        return lambda body: {key: _below(f".{key}", item, value) for key, value in _typed(dict, body).items()}
    if hint is float:
        return lambda value: float(value) if type(value) is int else _typed(float, value)
    return partial(_typed, hint)


def _object(schema: Any, extra: bool, given: tuple[str, ...] = ()) -> Callable[..., Any]:
    hints = get_type_hints(schema, include_extras=True)
    own = [f for f in fields(schema) if f.init and f.name not in given]
    required = {f.name for f in own if f.default is MISSING and f.default_factory is MISSING}
    readers = {f.name: _reader(hints[f.name], extra) for f in own}

    def read(value: Any, **given: Any) -> Any:
        body = _typed(dict, value)
        if missing := required - body.keys():
            raise _DamagedValue(": missing", *(f".{name}" for name in sorted(missing)))
        if not extra and (unknown := body.keys() - readers):
            raise _DamagedValue(": not known", *(f".{name}" for name in sorted(unknown)))
        values = {key: _below(f".{key}", readers[key], item) for key, item in body.items() if key in readers}
        return schema(**values, **given)

    return read


def _items(kind: type, hint: Any, extra: bool) -> Callable[[Any], Any]:
    """Reads a list. Millions of plain items are checked together, and one by one only to name the bad one."""
    plain, bounds = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    checked_at_once = plain in (int, str, bool) and all(type(bound) is range for bound in bounds)
    item = _reader(hint, extra)

    def read(value: Any) -> Any:
        values = value if type(value) is tuple else _typed(list, value)  # a body that is still in memory has tuples
        uniform = checked_at_once and set(map(type, values)) == {plain}
        if uniform and all(min(values) in bound and max(values) in bound for bound in bounds):
            return kind(values)
        return kind(_below(f"[{i}]", item, value) for i, value in enumerate(values))

    return read


def _bounded(read: Callable[[Any], Any], bounds: Sequence[Any]) -> Callable[[Any], Any]:
    words = [text for text in bounds if isinstance(text, str)]

    def checked(value: Any) -> Any:
        made = read(value)
        for bound in bounds:
            if isinstance(bound, range) and made not in bound:
                raise _DamagedValue(f"={made!r}, not {bound.start} to {bound.stop - 1}")
            if isinstance(bound, re.Pattern) and not bound.fullmatch(made):
                raise _DamagedValue(f"={made!r}, not {words[0] if words else f'of the form {bound.pattern}'}")
        return made

    return checked


def _below(key: str, read: Callable[[Any], Any], value: Any) -> Any:
    """`read(value)`; the keys of a complaint begin with `key`."""
    try:
        return read(value)
    except _DamagedValue as e:
        raise _DamagedValue(str(e), *(key + below for below in e.keys)) from None


def _typed(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
        raise _DamagedValue(f"={shown}, not {kind.__name__}")
    return value

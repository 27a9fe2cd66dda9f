"""Files that are published whole or not at all, and JSON of bounded size that is checked against a dataclass."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from conf.errors import TransientError, UserError

T = TypeVar("T")
GIB = 2**30  # bytes
JSON_LIMIT = 256 << 20  # bytes of a manifest or an index: both are held whole


def publish_json(path: Path, body: dict[str, Any]) -> None:
    """Publish a JSON object, indented, as UTF-8."""
    publish(path, (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode())


def publish(path: Path, data: bytes) -> None:
    """Write a staging file, fsync it, rename it: a reader sees the old file or the new one, never half of one."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with staging.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    rename(staging, path)


def rename(staging: Path, path: Path) -> None:
    """Move a fsynced file to its name, and make the move itself durable."""
    staging.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path, cure: str, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read the JSON object in a regular file of at most `limit` bytes.

    Raises:
        UserError: no such file, too large, or no JSON object; the message ends in `cure`.
        TransientError: the file cannot be read now.
    """
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as f:  # a fifo would wait
            if not stat.S_ISREG((status := os.fstat(f.fileno())).st_mode):
                raise UserError(f"{path}: not a regular file: {cure}")
            if status.st_size > limit:
                raise UserError(f"{path}: {status.st_size} bytes, more than the {limit} that are read: {cure}")
            body = json.loads(f.read(status.st_size).decode())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise UserError(f"{path}: {(e.strerror or str(e)).lower()}: {cure}") from None
    except OSError as e:
        raise TransientError(f"{path}: {(e.strerror or str(e)).lower()}: mend it, then try again") from e
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
        made: T = _object(schema, body, "", extra, given)
    except (ValueError, UserError) as e:
        raise UserError(f"{name}: damaged ({e}): {cure}") from None
    return made


def _value(hint: Any, value: Any, key: str, extra: bool) -> Any:
    """`value` as the type `hint` says; `key` is its place, such as `.shards[3].bytes`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _bounded(_value(args[0], value, key, extra), args[1:], key)
    if NoneType in args:
        other = next(arg for arg in args if arg is not NoneType)
        return None if value is None else _value(other, value, key, extra)
    if is_dataclass(hint):
        return _object(hint, value, key, extra)
    if origin in (list, tuple):
        values = (
            value if type(value) is tuple else _typed(list, value, key)
        )  # a body that is still in memory has tuples
        return origin(_items(args[0], values, key, extra))
    if origin in (dict, Mapping):
        return {k: _value(args[1], v, f"{key}.{k}", extra) for k, v in _typed(dict, value, key).items()}
    if hint is float and type(value) is int:
        return float(value)
    return _typed(hint, value, key)


def _object(schema: Any, value: Any, key: str, extra: bool, given: Mapping[str, Any] = {}) -> Any:
    hints, required = _fields(schema)
    body = _typed(dict, value, key)
    known = hints.keys() - given
    unknown = set() if extra else body.keys() - known
    for names, problem in ((required - given.keys() - body.keys(), "missing"), (unknown, "not known")):
        if names:
            raise ValueError(", ".join(f"{key}.{name}".lstrip(".") for name in sorted(names)) + f": {problem}")
    values = {name: _value(hints[name], body[name], f"{key}.{name}", extra) for name in body if name in known}
    return schema(**values, **given)


def _items(hint: Any, values: Sequence[Any], key: str, extra: bool) -> Sequence[Any]:
    """The items of a list. Millions of plain ones are checked together, and one by one only to name the bad one."""
    plain, bounds = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    if not values:
        return values
    uniform = plain in (int, str, bool) and set(map(type, values)) == {plain}
    if uniform and all(type(bound) is range and min(values) in bound and max(values) in bound for bound in bounds):
        return values
    return [_value(hint, value, f"{key}[{i}]", extra) for i, value in enumerate(values)]


def _bounded(value: Any, bounds: Sequence[Any], key: str) -> Any:
    for bound in bounds:
        if isinstance(bound, range) and value not in bound:
            raise ValueError(f"{key.lstrip('.')}={value!r}, not {bound.start} to {bound.stop - 1}")
        if isinstance(bound, re.Pattern) and not bound.fullmatch(value):
            words = [text for text in bounds if isinstance(text, str)] or [f"of the form {bound.pattern}"]
            raise ValueError(f"{key.lstrip('.')}={value!r}, not {words[0]}")
    return value


def _typed(kind: type, value: Any, key: str) -> Any:
    if type(value) is not kind:
        shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
        raise ValueError(f"{key.lstrip('.') or 'the whole'}={shown}, not {kind.__name__}")
    return value


@cache
def _fields(schema: Any) -> tuple[dict[str, Any], set[str]]:
    """The types of a dataclass's fields, and the names of those without a default."""
    hints = get_type_hints(schema, include_extras=True)
    given = [f for f in fields(schema) if f.init]
    required = {f.name for f in given if f.default is MISSING and f.default_factory is MISSING}
    return {f.name: hints[f.name] for f in given}, required

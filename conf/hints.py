"""The dotted keys of nested dataclasses: their names, their types, and these types in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


def near(word: str, known: Iterable[str]) -> str:
    """A suggestion in brackets if one of the known words is similar, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def keys(schema: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass, sections included."""
    out = []
    for f in fields(schema):
        hint = inner(get_type_hints(schema)[f.name])
        out += [prefix + f.name, *(keys(hint, f"{prefix}{f.name}.") if is_dataclass(hint) else ())]
    return out


def type_of(schema: Any, key: str) -> Any:
    """The declared type of a dotted key; None if there is no such key."""
    for name in key.split("."):
        if get_origin(schema) is dict:
            schema = get_args(schema)[1]
        else:
            schema = get_type_hints(inner(schema)).get(name) if is_dataclass(inner(schema)) else None
    return schema


def inner(hint: Any) -> Any:
    """The dataclass of `Class | None`; any other type as it is."""
    return next((a for a in get_args(hint) if is_dataclass(a)), hint) if NoneType in get_args(hint) else hint


def wording(hint: Any, key: str) -> str:
    """A type in words, such as "an integer or null"."""
    if NoneType in get_args(hint):
        return wording(get_args(hint)[0], key) + " or null"
    if get_args(hint) == (int, str):  # int | str: the text is one word, which the check of the dataclass knows
        return wording(get_args(hint)[0], key) + " or auto"
    if get_origin(hint) is list:
        return f"a list [a, b, ...], each {wording(get_args(hint)[0], key)}"
    if get_origin(hint) is dict:
        return f"a mapping {{name: value, ...}}, each {wording(get_args(hint)[1], f'{key}.NAME')}"
    if is_dataclass(hint):
        return f"its values one by one, {key}.{fields(hint)[0].name}=..."
    if issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[hint]

"""The settings of a dataclass and their meanings, as --help and docs/config.md show them."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from conf.hints import inner, wording

WIDTH = 110  # columns of a line of --help


def lines(schema: type, values: Any, hidden: Collection[str]) -> Iterator[str]:
    """Lines of --help: of each section its purpose, of each setting its value, type and meaning.

    `values`: those of the command without arguments, as nested dicts; `hidden`: the keys to leave out.
    """
    purposes = dict(sections(schema))
    found: dict[str, list[tuple[str, Any, str, Any]]] = {"": []}
    for setting in settings(schema):
        if setting[0] not in hidden:
            found.setdefault(setting[0].rpartition(".")[0], []).append(setting)
    for section, inside in found.items():
        yield from ["", *_folded(f"{section}.*: {purposes.get(section, '')}".rstrip(": "), 0)] if section else []
        for key, hint, comment, default in inside:
            value = value_at(values, key) if default is None else default
            yield from _folded(f"{key}={_shown(value)}  {wording(hint, key)}{comment and ': '}{comment}", 2)
            for word, meaning in words(hint).items():
                yield from _folded(f"{word}: {meaning}", 6) if meaning else []


def _folded(text: str, indent: int) -> list[str]:
    first, rest = " " * indent, " " * (indent + 4)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value == "???":
        return "..."
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.name if isinstance(value, Enum) else str(value)


def sections(schema: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, first paragraph of the docstring) of each nested dataclass."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        hint, key = hints[f.name], prefix + f.name
        if element := next((a for a in get_args(hint) if is_dataclass(a)), None):
            endings: dict[Any, str] = {dict: ".NAME", list: "[N]"}  # neither: a section that may be null
            hint, key = element, key + endings.get(get_origin(hint), "")
        if is_dataclass(hint):
            text = ast.get_docstring(class_node(hint)) or ""
            if text:
                yield key, " ".join(text.split("\n\n")[0].split())
            yield from sections(hint, f"{key}.")


def settings(schema: Any, prefix: str = "", inside: bool = False) -> Iterator[tuple[str, Any, str, Any]]:
    """(dotted key, type, the comment beside it, default) of each value, nested dataclasses opened.

    The default is None if the YAML files give it; `inside` a mapping or list of dataclasses it is the dataclass's.
    """
    hints, beside = get_type_hints(schema), comments(schema)
    for f in fields(schema):
        hint, key = inner(hints[f.name]), prefix + f.name
        element = next((a for a in get_args(hint) if is_dataclass(a)), None)
        if is_dataclass(hint) and hints[f.name] is not hint:
            yield key, hints[f.name], beside.get(f.name, ""), "null" if f.default is None else None
            yield from settings(hint, f"{key}.", True)
        elif is_dataclass(hint) and inside:
            yield from settings(hint, f"{key}.", True)
        elif is_dataclass(hint):
            yield from settings(hint, f"{key}.")
        elif element is None:
            yield key, hint, beside.get(f.name, ""), _default(f) if inside else None
        elif isinstance(element, type) and issubclass(schema, element):  # each as this one
            yield key, hint, beside.get(f.name, ""), None
        else:
            yield key, hint, beside.get(f.name, ""), None
            yield from settings(element, f"{key}.NAME." if get_origin(hint) is dict else f"{key}[N].", True)


def _default(f: Field[Any]) -> Any:
    made = f.default if f.default_factory is MISSING else f.default_factory()
    return "null" if made is None else made


@cache
def comments(cls: type) -> dict[str, str]:
    """The comment on the line of each field of a dataclass, or member of an enum."""
    if len(line := [c for c in cls.__mro__ if is_dataclass(c)]) > 1:  # an heir's fields are in several classes
        return {name: text for c in reversed(line) for name, text in _comments(c).items()}
    return _comments(cls)


def _comments(cls: type) -> dict[str, str]:
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {t.start[0]: t.string.removeprefix("#").strip() for t in tokens if t.type == tokenize.COMMENT}
    assigned = [node for node in class_node(cls).body if isinstance(node, ast.AnnAssign | ast.Assign)]
    targets = [
        (node.target if isinstance(node, ast.AnnAssign) else node.targets[0], node.end_lineno) for node in assigned
    ]
    return {ast.unparse(target): by_line[line] for target, line in targets if line in by_line}


def class_node(cls: Any) -> ast.ClassDef:
    return _class_node(cls)


@cache
def _class_node(cls: type) -> ast.ClassDef:
    node = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(node, ast.ClassDef)
    return node


def words(hint: Any) -> dict[str, str]:
    """The words that an enum allows, each with its comment; {} of another type."""
    kind = next((a for a in get_args(hint) if isinstance(a, type) and issubclass(a, Enum)), hint)
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        return {}
    beside = comments(kind)
    return {member.name: beside.get(member.name, "") for member in kind}


def value_at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict):
            return "???"  # a group that must be given
        tree = tree[name]
    return tree

"""`make docs` writes docs/config.md from the dataclasses and from conf/; tests/test_docs.py fails where it is stale."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from conf.schema import CONF, ROOTS, defaults, groups, opening_comment, options

TARGET = Path(__file__).with_name("config.md")
HEAD = """# Every value of every command

Made by `make docs` from `*/config.py` and `conf/`; change those, not this page. `GROUP=OPTION` chooses a file of a
group, `KEY=VALUE` sets a value; the command line has the last word. `--help` prints the groups, `--cfg job` the whole
config. Text is taken as it stands: `prompt='Hello, world'` needs no second pair of quotes.
"""


def page() -> str:
    parts = [HEAD]
    for root, schema in ROOTS.items():
        parts += [f"## conf/{root}.yaml\n\n{opening_comment(CONF / f'{root}.yaml')}\n", table(root, schema)]
    parts.append("## Groups\n")
    for group in dict.fromkeys(group for root in ROOTS for group in groups(root)):
        used = ", ".join(f"{root}.yaml" for root in ROOTS if group in groups(root))
        rows = [f"| `{group}={option}` | {comment} |" for option, comment in options(group).items()]
        parts.append("\n".join([f"### {group} ({used})\n", "| option | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def table(root: str, schema: type) -> str:
    rows = ["| key | type | without it | |", "|---|---|---|---|"]
    chosen, said = groups(root), defaults(root)
    for key, hint, comment in keys(schema):
        group, _, name = key.partition(".")
        if group in chosen and name == "name":
            continue  # the group's own choice
        rows.append(f"| `{key}` | {wording(hint)} | {shown(value_at(said, key))} | {meaning(hint, comment)} |")
    notes = [f"`{prefix}.*`: {doc}" for prefix, doc in docs(schema)]
    return "\n".join([*rows, "", *(f"{note}\n" for note in notes)])


def docs(schema: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, first paragraph) of each nested dataclass that says what it is."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            text = ast.get_docstring(class_node(hints[f.name])) or ""
            if text:
                yield prefix + f.name, " ".join(text.split("\n\n")[0].split())
            yield from docs(hints[f.name], f"{prefix}{f.name}.")


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, type, the comment beside it) of each value, nested dataclasses opened."""
    hints, beside = get_type_hints(schema), comments(schema)
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name], beside.get(f.name, "")


def comments(cls: type) -> dict[str, str]:
    """The comment on the line of each field of a dataclass, or member of an enum."""
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {t.start[0]: t.string.removeprefix("#").strip() for t in tokens if t.type == tokenize.COMMENT}
    assigned = [node for node in class_node(cls).body if isinstance(node, ast.AnnAssign | ast.Assign)]
    targets = [
        (node.target if isinstance(node, ast.AnnAssign) else node.targets[0], node.end_lineno) for node in assigned
    ]
    return {ast.unparse(target): by_line[line] for target, line in targets if line in by_line}


def class_node(cls: Any) -> ast.ClassDef:
    node = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(node, ast.ClassDef)
    return node


def wording(hint: Any) -> str:
    inner = next((a for a in get_args(hint) if isinstance(a, type) and issubclass(a, Enum)), hint)
    if isinstance(inner, type) and issubclass(inner, Enum):
        return ", ".join(f"`{member.name}`" for member in inner)
    return (hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)).replace(
        " | None", " or null"
    )


def meaning(hint: Any, comment: str) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        comment = "; ".join([comment] * bool(comment) + [f"`{name}`: {text}" for name, text in comments(hint).items()])
    return comment.replace("|", "\\|")


def value_at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict):
            return "???"  # a group that must be given
        tree = tree[name]
    return tree


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value == "???":
        return "must be given"
    written = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value
    return f"`{written}`"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")

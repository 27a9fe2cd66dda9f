"""`make docs` writes docs/config.md from the dataclasses and from conf/; tests/test_docs.py fails if it is stale."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from conf.hints import inner
from conf.schema import CONF, defaults, groups, opening_comment, options, root_of
from data_pipeline.config import OrderConfig
from data_pipeline.prepare.prepare_config import PrepareConfig
from data_pipeline.prepare.quality.config import QualityEvaluateConfig, QualityTrainConfig
from data_pipeline.shards.shards_config import (
    BpeCodeConfig,
    BpeTrainConfig,
    ExportConfig,
    ImportConfig,
    ShardsConfig,
    VerifyConfig,
)
from launch.config import CompareConfig, DoctorConfig, PlanConfig, StatusConfig, SubmitConfig, SuperviseConfig
from trainer.config.generate import GenerateConfig
from trainer.config.hf import ExportHfConfig, ImportHfConfig
from trainer.config.node_check import NodeCheckConfig
from trainer.config.pretrain import PretrainConfig
from trainer.config.tracking import SyncConfig

SCHEMAS = (
    BpeTrainConfig,
    BpeCodeConfig,
    ShardsConfig,
    ImportConfig,
    ExportConfig,
    VerifyConfig,
    PrepareConfig,
    QualityTrainConfig,
    QualityEvaluateConfig,
    OrderConfig,
    PretrainConfig,
    GenerateConfig,
    ImportHfConfig,
    ExportHfConfig,
    PlanConfig,
    SuperviseConfig,
    SubmitConfig,
    DoctorConfig,
    NodeCheckConfig,
    SyncConfig,
    StatusConfig,
    CompareConfig,
)
ROOTS: dict[str, type] = {root_of(schema): schema for schema in SCHEMAS}
"""The dataclass of each YAML file at the top of conf/."""

TARGET = Path(__file__).with_name("config.md")
HEAD = """# Every value of every command

Made by `make docs` from `*/config.py` and `conf/`; change those, not this page. `GROUP=OPTION` chooses a file of a
group, `KEY=VALUE` sets a value; the command line has the last word. `--help` prints the groups, `--cfg job` the whole
config. Text is taken literally: `prompt='Hello, world'` needs no second pair of quotes.
"""


def page() -> str:
    parts = [HEAD]
    for root, schema in ROOTS.items():
        parts += [f"## conf/{root}.yaml\n\n{opening_comment(CONF / f'{root}.yaml')}\n", table(schema)]
    parts.append("## Groups\n")
    for group in dict.fromkeys(group for root in ROOTS for group in groups(ROOTS[root])):
        used = ", ".join(f"{root}.yaml" for root in ROOTS if group in groups(ROOTS[root]))
        rows = [f"| `{group}={option}` | {comment} |" for option, comment in options(group).items()]
        parts.append("\n".join([f"### {group} ({used})\n", "| option | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def table(schema: type) -> str:
    rows = ["| key | type | without it | |", "|---|---|---|---|"]
    chosen, said = groups(schema), defaults(schema)
    for key, hint, comment, default in keys(schema):
        group, _, name = key.partition(".")
        if group in chosen and name == "name":
            continue  # the group's own choice
        value = value_at(said, key) if default is None else default
        rows.append(f"| `{key}` | {wording(hint)} | {shown(value)} | {meaning(hint, comment)} |")
    notes = [f"`{prefix}.*`: {doc}" for prefix, doc in docs(schema)]
    return "\n".join([*rows, "", *(f"{note}\n" for note in notes)])


def docs(schema: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, first paragraph of the docstring) of each nested dataclass."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        hint, key = hints[f.name], prefix + f.name
        if element := next((a for a in get_args(hint) if is_dataclass(a)), None):
            hint, key = element, key + {dict: ".NAME", list: "[N]"}.get(get_origin(hint), "")  # or one that may be null
        if is_dataclass(hint):
            text = ast.get_docstring(class_node(hint)) or ""
            if text:
                yield key, " ".join(text.split("\n\n")[0].split())
            yield from docs(hint, f"{key}.")


def keys(schema: Any, prefix: str = "", inside: bool = False) -> Iterator[tuple[str, Any, str, Any]]:
    """(dotted key, type, the comment beside it, default) of each value, nested dataclasses opened.

    The default is None if the YAML files give it; `inside` a mapping or list of dataclasses it is the dataclass's.
    """
    hints, beside = get_type_hints(schema), comments(schema)
    for f in fields(schema):
        hint, key = inner(hints[f.name]), prefix + f.name
        element = next((a for a in get_args(hint) if is_dataclass(a)), None)
        if is_dataclass(hint) and hints[f.name] is not hint:
            yield key, hints[f.name], beside.get(f.name, ""), "null" if f.default is None else None
            yield from keys(hint, f"{key}.", True)
        elif is_dataclass(hint) and inside:
            yield from keys(hint, f"{key}.", True)
        elif is_dataclass(hint):
            yield from keys(hint, f"{key}.")
        elif element is None:
            yield key, hint, beside.get(f.name, ""), _default(f) if inside else None
        elif isinstance(element, type) and issubclass(schema, element):  # each as this one
            yield key, hint, beside.get(f.name, ""), None
        else:
            yield key, hint, beside.get(f.name, ""), None
            yield from keys(element, f"{key}.NAME." if get_origin(hint) is dict else f"{key}[N].", True)


def _default(f: Field[Any]) -> Any:
    made = f.default if f.default_factory is MISSING else f.default_factory()
    return "null" if made is None else made


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
    node = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(node, ast.ClassDef)
    return node


def wording(hint: Any) -> str:
    if get_args(hint) == (int, str):
        return "int or `auto`"
    if element := next((a for a in get_args(hint) if is_dataclass(a)), None):
        many = {dict: "mapping of names to ", list: "list of "}.get(get_origin(hint), "")
        return f"{many}{element.__name__}{'' if many else ' or null'}"
    inner = next((a for a in get_args(hint) if isinstance(a, type) and issubclass(a, Enum)), hint)
    if isinstance(inner, type) and issubclass(inner, Enum):
        return ", ".join(f"`{member.name}`" for member in inner)
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"typing\.Optional\[(.*)\]", r"\1 or null", text).replace(" | None", " or null")


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

"""A config as a YAML file and back: a run keeps one, and a job starts from one.

A frozen file is data. A text in it is just that text: `${x}` is not looked up anywhere, and a file with a YAML tag, an
anchor or an alias, which no frozen config has, is refused.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import UserError, of_nature

T = TypeVar("T")
MAX_BYTES = 1 << 18
MAX_LEVELS = 32


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is not one plain word: PyYAML's other styles lose some line breaks."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key comes twice", node.start_mark)
        return mapping


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z_/][\w/.-]*", text, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(Enum, lambda dumper, member: _text(dumper, member.name))


def freeze(cfg: Any) -> str:
    """A config as YAML, for people to read and for `thaw`."""
    return yaml.dump(asdict(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


def thaw(path: Path, schema: type[T], section: str | None = None) -> T:
    """The config in a file that `freeze` wrote, or one section of it, which says nothing of the others.

    Raises:
        UserError: no such file, no YAML, too large, unknown keys, or values that the dataclass refuses.
        TransientError: the file cannot be read now.
    """
    try:
        body: Any = peek(path)
        if section is not None and not isinstance(body := body.get(section), dict):
            raise UserError(f"no section {section}")
        cfg = OmegaConf.merge(OmegaConf.structured(schema), _literals(body))
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"not given: {', '.join(missing)}")
        return cast(T, OmegaConf.to_object(cfg))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as e:
        key = getattr(e, "full_key", None)
        why = user_error_in(e) or (f"{key}: " if key else "") + flat(e)
        raise UserError(f"{path}: not a frozen config: {why}") from None


def peek(path: Path) -> dict[str, Any]:
    """The content of a frozen config, unchecked: for runs of other versions. Raises as `thaw`."""
    try:
        body = yaml.load(_plain_yaml(_read(path)), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"not a frozen config: {flat(e)}") from None
    if not isinstance(body, dict):
        raise UserError("not a mapping of keys to values")
    return body


def by_key(body: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted keys; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in body.items():
        name = f"{above}{key}"
        found |= by_key(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def literal(text: str) -> str:
    """A value for one of our command lines that arrives as just this text, whatever it contains."""
    quoted = text == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"")
    text = _inert(_inert(text))  # composing resolves it once, making the dataclass once more
    if not quoted:
        return text
    return "'" + re.sub(r"(\\*)(')", r"\1\1\\\2", text) + "'"


def user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError of a nested dataclass that an error of OmegaConf wraps."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def flat(error: Exception) -> str:
    """The message of Hydra or OmegaConf in one line, without its last part, on Hydra's own switches."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text.split(" full_key:")[0].split(" Set the environment variable HYDRA")[0].split(" Config search path")[0]


def _read(path: Path) -> str:
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as f:  # a fifo would wait
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise UserError("not a regular file")
            if len(data := f.read(MAX_BYTES + 1)) > MAX_BYTES:
                raise UserError(f"more than the {MAX_BYTES} bytes that a frozen config may have")
            return data.decode()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise UserError((e.strerror or str(e)).lower()) from None
    except OSError as e:
        raise of_nature(e, (e.strerror or str(e)).lower()) from None


def _plain_yaml(text: str) -> str:
    """`text`, if it is only data: a small file of aliases can expand to a huge one."""
    level = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if level > MAX_LEVELS:  # PyYAML takes quadratic time
            raise UserError(f"line {event.start_mark.line + 1}: more than {MAX_LEVELS} levels")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UserError(f"line {event.start_mark.line + 1}: a YAML anchor or alias, which no frozen config has")
        if getattr(event, "tag", None):
            raise UserError(f"line {event.start_mark.line + 1}: a YAML tag, {event.tag}, which no frozen config has")
    return text


def _literals(body: Any) -> Any:
    """`body` with every text escaped, so that OmegaConf leaves it as it is."""
    if isinstance(body, dict):
        return {key: _literals(value) for key, value in body.items()}
    if isinstance(body, list):
        return [_literals(value) for value in body]
    return _inert(body) if isinstance(body, str) else body


def _inert(text: str) -> str:
    """`text` escaped for OmegaConf, which looks up `${x}`, reads `\\${x}` as `${x}`, and halves backslashes before."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)

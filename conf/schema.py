"""Composition of a command's config with Hydra, and one-line errors for what does not compose.

Hydra only composes; a command gets a plain, checked dataclass. The only module that imports Hydra.
"""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import meanings
from conf.errors import UserError, may_pass, out_of_memory
from conf.frozen import flat, thaw, user_error_in
from conf.hints import inner, keys, near, type_of, wording

T = TypeVar("T")
Command = tuple[type, Callable[[Any], None]]
CONF = Path(__file__).resolve().parent
FROZEN = "frozen="  # on a command line: a file that `freeze` wrote
BY_HAND = "data.allow_pipe"  # what no frozen file grants, for it may be another person's
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError)  # ValueError: a group set to null


def root_of(schema: type) -> str:
    """The name of the YAML file in conf/ for an entry's dataclass: `pretrain` for PretrainConfig."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", schema.__name__.removesuffix("Config")).lower()


def run(schema: type[T], function: Callable[[T], None]) -> None:
    """Compose the config of a command, check it and call `function`: the body of `if __name__ == "__main__"`.

    `--help` explains the groups and each value, `--cfg job` prints the config that the command would get.

    Exits with code 2 and one line after a user's mistake; with code 1 and one line if the machine or a server fails (a
    full disk, no answer; `conf.errors`), which may go away, so `launch.supervise` tries again.
    """
    with _exit_codes():
        _run_one(schema, function, sys.argv[1:])


def run_one_of(commands: Mapping[str, Command]) -> None:
    """As `run`, for a module of several commands: the first word of the command line names one of them."""
    argv = sys.argv[1:]
    with _exit_codes():
        if argv[:1] in (["--help"], ["-h"]):
            _show("\n".join(opening_comment(CONF / f"{root_of(schema)}.yaml") for schema, _ in commands.values()))
            return
        word = argv.pop(0) if argv else "nothing"
        if word not in commands:
            raise UserError(f"{word}: first give one of {', '.join(commands)}; --help explains them")
        _run_one(*commands[word], argv)


def _run_one(schema: type[T], function: Callable[[T], None], argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        _show(explain(schema))
    elif "--cfg" in argv:
        i = argv.index("--cfg")
        if argv[i + 1 : i + 2] != ["job"]:
            raise UserError("--cfg: write --cfg job, which prints the config that the run would get")
        _show(OmegaConf.to_yaml(_compose(schema, argv[:i] + argv[i + 2 :])).rstrip("\n"))
    else:
        tell_twice(argv)
        function(load(schema, argv))


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Exit with one line and the code of the error: 1 if it may pass by itself, else 2; 130 for ^C."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as e:
        if isinstance(e, BrokenPipeError) and _reader_left():
            sys.exit(141)  # as a shell says SIGPIPE: `... | head` has read enough
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1 if may_pass(e) else 2)
    except (MemoryError, RuntimeError, ImportError) as e:
        if (line := out_of_memory(e)) is None:
            raise
        print(f"error: {line}: give the process more, or the work a smaller batch or model", file=sys.stderr)
        sys.exit(1)


def _reader_left() -> bool:
    """Return True if nobody reads our stdout any more, which is then closed for good."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return True


def tell_twice(overrides: Sequence[str]) -> None:
    """Warn of a key with two values on one command line, of which the last counts."""
    given: dict[str, str] = {}
    for text in overrides:
        key, mark, value = text.partition("=")
        if mark and given.get(key, value) != value:
            print(f"warning: {key}={given[key]} and {key}={value} are given: the last counts", file=sys.stderr)
        given[key] = value


def load(schema: type[T], overrides: Sequence[str] = ()) -> T:
    """The config of a command: composed from its YAML in conf/ and `overrides`, or read whole from `frozen=FILE`.

    Raises:
        UserError: a typo, a wrong type, a missing value or an impossible combination, in one line.
    """
    frozen = [text for text in overrides if text.startswith(FROZEN)]
    if frozen:
        return _thawed(schema, frozen[0], [text for text in overrides if text != frozen[0]])
    cfg = _compose(schema, overrides)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"not given: {', '.join(missing)} (add {missing[0]}=... to the command line)")
    try:
        return cast(T, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as e:  # OmegaConf wraps the errors of nested dataclasses
        raise user_error_in(e) or UserError(flat(e)) from None


def _thawed(schema: type[T], frozen: str, beside: list[str]) -> T:
    grantable = type_of(schema, BY_HAND) is not None
    if beside and not (grantable and beside in ([f"{BY_HAND}=true"], [f"{BY_HAND}=false"])):
        also = f", except {BY_HAND}=true" if grantable else ""
        raise UserError(f"{frozen} is the whole config: give nothing else{also}")
    cfg: Any = thaw(Path(frozen.removeprefix(FROZEN)), schema)
    if grantable:
        cfg.data.allow_pipe = f"{BY_HAND}=true" in beside
    return cast(T, cfg)


def defaults(schema: type) -> dict[str, Any]:
    """The values of a command without overrides, as nested dicts; "???" for a required value."""
    return OmegaConf.to_container(_compose(schema, ()), enum_to_str=True)  # type: ignore[return-value]


def groups(schema: type) -> dict[str, str | None]:
    """The config groups of a command, in order, each with its default option."""
    items = OmegaConf.load(CONF / f"{root_of(schema)}.yaml").defaults
    pairs = (pair for item in items if isinstance(item, DictConfig) for pair in item.items())
    return {str(group): option for group, option in pairs if not str(group).startswith("override ")}


def options(group: str) -> dict[str, str]:
    """The options of a group, each with the comment that opens its file."""
    return {path.stem: opening_comment(path) for path in sorted((CONF / group).glob("*.yaml"))}


def opening_comment(path: Path) -> str:
    """The first comment of a YAML file, except directives of Hydra (`# @package ...`)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("#") and not line.startswith("# @")), "")


def explain(schema: type) -> str:
    """The text of `--help`: the purpose of the command, its required values, its groups and all values."""
    cfg = _compose(schema, ())
    lines = [
        opening_comment(CONF / f"{root_of(schema)}.yaml"),
        "",
        "Usage: GROUP=OPTION or KEY=VALUE, as many as you like.",
    ]
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        lines += ["Must be given: " + ", ".join(missing)]
    for group, default in groups(schema).items():
        lines += ["", f"{group}= (without it: {default or 'none'})"]
        lines += [f"  {name:<12}  {comment}" for name, comment in options(group).items()]
    values = OmegaConf.to_container(cfg, enum_to_str=True)
    named = {f"{group}.name" for group in groups(schema)}  # the choice of a group
    lines += ["", "Values (... must be given; where a section is null, only once it is opened):"]
    lines += meanings.lines(schema, values, named)
    return "\n".join(lines)


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python must not flush into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _compose(schema: type, overrides: Sequence[str]) -> DictConfig:
    """Hydra's config for a command, resolved; raises UserError that names the first override at fault."""
    root = root_of(schema)
    ConfigStore.instance().store(name=f"{root}_schema", node=schema)
    for text in overrides:
        _check_form(text)
    quoted = [_quote(schema, text) for text in overrides]
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        try:
            return _resolved(root, quoted)
        except COMPOSE_ERRORS as e:
            for i, text in enumerate(overrides):  # the first one up to which they do not compose
                try:
                    _resolved(root, quoted[: i + 1])
                except COMPOSE_ERRORS as cause:
                    raise UserError(_complaint(schema, text, cause)) from None
            raise UserError(flat(e)) from None


def _resolved(root: str, overrides: list[str]) -> DictConfig:
    cfg = compose(root, overrides)
    OmegaConf.resolve(cfg)
    return cfg


def _check_form(text: str) -> None:
    """Raises UserError for an argument that is not key=value."""
    if text.startswith("--local_rank"):
        raise UserError(f"{text}: comes from DeepSpeed's launcher, start it with: deepspeed --no_local_rank")
    if text.startswith("-"):
        raise UserError(
            f"{text}: not a flag; values are given as key=value, --help explains them, --cfg job prints them"
        )
    if text.startswith(("+", "~", "hydra.", "hydra/")):
        raise UserError(f"{text}: keys are neither added nor removed, give key=value; --cfg job prints all keys")
    if "=" not in text:
        raise UserError(f"{text}: write it as key=value (a value with spaces in quotes); --cfg job prints all keys")


def _quote(schema: type, override: str) -> str:
    """The override in Hydra's grammar.

    Text is quoted, so that prompt='Hello, {world}' and a path with '=' need no second pair of quotes. A text for a list
    of texts is a list of one: tasks=lambada.

    In a mapping with keys of the user, data.sources.NAME.path=X becomes data.sources={NAME: {path: X}}, which Hydra
    merges even if NAME is new. The same holds for a section that may be null: recipe.length.min_chars=9 becomes
    recipe={length: {min_chars: 9}}, which opens the section with its default values.
    """
    key, _, value = override.partition("=")
    hint = type_of(schema, key)
    one_of_a_list = hint == list[str] and value not in ("", "null") and not value.startswith("[") and "," not in value
    is_text = hint in (str, str | None) or one_of_a_list
    if is_text and value != "null" and not (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        value = QuotedString(value, Quote.single).with_quotes()
    if one_of_a_list:
        value = f"[{value}]"
    parts = key.split(".")
    for n in range(1, len(parts) + 1):
        hint, below = (type_of(schema, ".".join(parts[:end])) for end in (n, n + 1))
        opens = inner(below) is not below and (n + 1 < len(parts) or value.startswith("{"))
        if get_origin(hint) is dict or (n < len(parts) and opens):
            nested = "".join(f"{{{part}: " for part in parts[n:]) + value + "}" * (len(parts) - n)
            return f"++{'.'.join(parts[:n])}={nested}"
    return f"{key}={value}"


def _complaint(schema: type, override: str, error: Exception) -> str:
    """One sentence on an override that does not compose, with the accepted values."""
    key, _, value = override.partition("=")
    if key in groups(schema):
        if value in options(key):
            return f"{override}: {flat(error)} (it may be an option of another command)"
        unset = "" if groups(schema)[key] else ", or leave it out"
        return f"{override}: give one of {', '.join(options(key))}{unset}{near(value, options(key))}"
    expected = type_of(schema, key)
    if expected is None:
        known = [k for k in keys(schema) if not key.startswith(f"{k}.")]
        return f"{key}: no such key{near(key, known) or '; --cfg job prints all keys'}"
    if expected is str or "${" in value:
        return f"{override}: {flat(error)}"
    return f"{override}: give {wording(expected, key)}"

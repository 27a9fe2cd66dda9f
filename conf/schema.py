"""Hydra's door: registers the dataclasses, composes an entry's config, freezes it, and says in one line what is wrong.

Hydra only composes; what an entry gets is a plain, checked dataclass.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.frozen import flat, freeze, literal, peek, thaw, user_error_in
from conf.hints import inner, keys, near, type_of, wording
from data_pipeline.config import OrderConfig, Passing, UserError
from data_pipeline.prepare import config as prepare
from data_pipeline.prepare import quality_config
from launch.config import DoctorConfig, PlanConfig, StatusConfig, SubmitConfig, SuperviseConfig
from trainer.checkpoint_config import ExportHfConfig, GenerateConfig, ImportHfConfig
from trainer.config import PretrainConfig
from trainer.node_config import NodeCheckConfig
from trainer.tracking_config import SyncConfig

__all__ = [
    "CONF",
    "ROOTS",
    "defaults",
    "explain",
    "freeze",
    "groups",
    "literal",
    "load",
    "options",
    "peek",
    "run",
    "thaw",
]
HYDRAS = (HydraException, OmegaConfBaseException, ValueError)  # ValueError: a group set to null
Entry = tuple[str, Callable[[Any], None]]

FROZEN = "frozen="  # on a command line: the file that `freeze` made
CONF = Path(__file__).resolve().parent
ROOTS: dict[str, type] = {
    "bpe_train": prepare.BpeTrainConfig,
    "bpe_code": prepare.BpeCodeConfig,
    "shards": prepare.ShardsConfig,
    "import": prepare.ImportConfig,
    "export": prepare.ExportConfig,
    "verify": prepare.VerifyConfig,
    "prepare": prepare.PrepareConfig,
    "quality_train": quality_config.QualityTrainConfig,
    "quality_evaluate": quality_config.QualityEvaluateConfig,
    "order": OrderConfig,
    "pretrain": PretrainConfig,
    "generate": GenerateConfig,
    "import_hf": ImportHfConfig,
    "export_hf": ExportHfConfig,
    "plan": PlanConfig,
    "supervise": SuperviseConfig,
    "submit": SubmitConfig,
    "doctor": DoctorConfig,
    "node_check": NodeCheckConfig,
    "sync": SyncConfig,
    "status": StatusConfig,
}
"""Each root YAML in conf/ and the dataclass that an entry gets from it."""

for _name, _schema in ROOTS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def run(entries: Mapping[str, Entry] | Entry) -> None:
    """The body of `if __name__ == "__main__"`: compose, check, call.

    A user's mistake ends in one line and exit code 2; what the machine or a server refuses (a full disk, a missing
    file, no answer) in one line and exit code 1, for it may pass: `launch.supervise` tries again.

    `entries` is (root, function), or one such pair for each command word that stands first on the command line.
    `--help` explains the groups and the values, `--cfg job` prints the config that the run would get.
    """
    argv = sys.argv[1:]
    try:
        root, function = _choose(entries, argv)
        if {"--help", "-h"} & set(argv):
            _show(explain(root))
        elif "--cfg" in argv:
            at = argv.index("--cfg")
            if argv[at + 1 : at + 2] != ["job"]:
                raise UserError("--cfg: write --cfg job, which prints the config that the run would get")
            _show(OmegaConf.to_yaml(_compose(root, argv[:at] + argv[at + 2 :])).rstrip("\n"))
        else:
            function(load(root, argv))
    except (Passing, OSError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def load(root: str, overrides: Sequence[str] = ()) -> Any:
    """Compose `conf/<root>.yaml` with `overrides` into its dataclass, or take it whole from `frozen=FILE`.

    Raises:
        UserError: a typo, a wrong type, a missing value or an impossible combination, in one line.
    """
    frozen = [text for text in overrides if text.startswith(FROZEN)]
    if frozen and len(overrides) > 1:
        raise UserError(f"{frozen[0]} is the whole config: give nothing beside it")
    if frozen:
        return thaw(Path(frozen[0].removeprefix(FROZEN)), ROOTS[root])
    cfg = _compose(root, overrides)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"not given: {', '.join(missing)} (add {missing[0]}=... to the command line)")
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as e:  # a check in a nested dataclass arrives wrapped
        raise user_error_in(e) or UserError(flat(e)) from None


def defaults(root: str) -> dict[str, Any]:
    """What `conf/<root>.yaml` says when nothing is said, nested, plain; "???" where a value must be given."""
    return OmegaConf.to_container(_compose(root, ()), enum_to_str=True)  # type: ignore[return-value]


def groups(root: str) -> dict[str, str | None]:
    """The config groups of `conf/<root>.yaml`, in order, each with the option it takes when nothing is said."""
    found: dict[str, str | None] = {}
    for item in OmegaConf.load(CONF / f"{root}.yaml").defaults:
        if isinstance(item, DictConfig):
            found |= {str(k): v for k, v in item.items() if not str(k).startswith("override ")}
    return found


def options(group: str) -> dict[str, str]:
    """The options of a group, each with the comment that opens its file."""
    return {path.stem: opening_comment(path) for path in sorted((CONF / group).glob("*.yaml"))}


def opening_comment(path: Path) -> str:
    """The first comment of a YAML file that is not a mark for Hydra (`# @package ...`)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("#") and not line.startswith("# @")), "")


def explain(root: str) -> str:
    """What `--help` prints: what the command does, what it must be given, its groups, its values."""
    cfg = _compose(root, ())
    lines = [opening_comment(CONF / f"{root}.yaml"), "", "Usage: GROUP=OPTION or KEY=VALUE, as many as you like."]
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        lines += ["Must be given: " + ", ".join(missing)]
    for group, default in groups(root).items():
        lines += ["", f"{group}= (without it: {default or 'none'})"]
        lines += [f"  {name:<12}  {comment}" for name, comment in options(group).items()]
    values = ("  " + line for line in OmegaConf.to_yaml(cfg).splitlines())
    lines += ["", "Values (docs/config.md explains each):", *values]
    return "\n".join(lines)


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, head for one, has seen enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _choose(entries: Mapping[str, Entry] | Entry, argv: list[str]) -> Entry:
    """The (root, function) that is asked for; takes the command word off `argv`."""
    if isinstance(entries, tuple):
        return entries
    if argv[:1] in (["--help"], ["-h"]):
        _show("\n".join(opening_comment(CONF / f"{root}.yaml") for root, _ in entries.values()))
        sys.exit(0)
    word = argv.pop(0) if argv else "nothing"
    if word not in entries:
        raise UserError(f"{word}: say first what to do, one of {', '.join(entries)}; --help explains them")
    return entries[word]


def _compose(root: str, overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        _check_form(text)
    quoted = [_quote(ROOTS[root], text) for text in overrides]
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        try:
            return _resolved(root, quoted)
        except HYDRAS as e:
            for i, text in enumerate(overrides):  # the first without which the rest before it composes
                try:
                    _resolved(root, quoted[: i + 1])
                except HYDRAS as cause:
                    raise UserError(_complaint(root, text, cause)) from None
            raise UserError(flat(e)) from None


def _resolved(root: str, overrides: list[str]) -> DictConfig:
    cfg = compose(root, overrides)
    OmegaConf.resolve(cfg)
    return cfg


def _check_form(text: str) -> None:
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
    """Text is taken as it stands, so that prompt='Hello, {world}' and a path with '=' need no second pair of quotes.

    In a mapping whose keys are the user's own, data.sources.NAME.path=X becomes data.sources={NAME: {path: X}}, which
    Hydra merges also where NAME is not there yet. So it is with a section that may be null: recipe.length.min_chars=9
    becomes recipe={length: {min_chars: 9}}, which opens it with its own values.
    """
    key, _, value = override.partition("=")
    is_text = type_of(schema, key) in (str, str | None)
    if is_text and value != "null" and not (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        value = QuotedString(value, Quote.single).with_quotes()
    parts = key.split(".")
    for n in range(1, len(parts) + 1):
        hint, below = (type_of(schema, ".".join(parts[:end])) for end in (n, n + 1))
        opens = inner(below) is not below and (n + 1 < len(parts) or value.startswith("{"))
        if get_origin(hint) is dict or (n < len(parts) and opens):
            nested = "".join(f"{{{part}: " for part in parts[n:]) + value + "}" * (len(parts) - n)
            return f"++{'.'.join(parts[:n])}={nested}"
    return f"{key}={value}"


def _complaint(root: str, override: str, error: Exception) -> str:
    """One sentence on an override that does not compose: what it should have been."""
    key, _, value = override.partition("=")
    if key in groups(root):
        if value in options(key):
            return f"{override}: {flat(error)} (it may be an option of another command)"
        unset = "" if groups(root)[key] else ", or leave it out"
        return f"{override}: give one of {', '.join(options(key))}{unset}{near(value, options(key))}"
    expected = type_of(ROOTS[root], key)
    if expected is None:
        known = [k for k in keys(ROOTS[root]) if not key.startswith(f"{k}.")]
        return f"{key}: no such key{near(key, known) or '; --cfg job prints all keys'}"
    if expected is str or "${" in value:
        return f"{override}: {flat(error)}"
    return f"{override}: give {wording(expected, key)}"

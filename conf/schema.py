"""Hydra's door: registers the dataclasses, composes an entry's config, freezes it.

The only Python in conf/. Hydra only composes; what an entry gets is a plain, checked dataclass.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data_pipeline.config import BpeCodeConfig, BpeTrainConfig, ShardsConfig, UserError, VerifyConfig
from trainer.config import GenerateConfig, PretrainConfig

T = TypeVar("T")

ROOTS: dict[str, type] = {
    "bpe_train": BpeTrainConfig,
    "bpe_code": BpeCodeConfig,
    "shards": ShardsConfig,
    "verify": VerifyConfig,
    "pretrain": PretrainConfig,
    "generate": GenerateConfig,
}
"""Each root YAML in conf/ and the dataclass that an entry gets from it."""

for _name, _schema in ROOTS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def run(entries: dict[str, tuple[str, Callable[[Any], None]]] | tuple[str, Callable[[Any], None]]) -> None:
    """The body of `if __name__ == "__main__"`: compose, check, call; a user's mistake ends in one line and exit code 2.

    `entries` is (root, function), or one such pair for each command word that stands first on the command line.
    """
    argv = sys.argv[1:]
    try:
        if isinstance(entries, dict):
            word = argv.pop(0) if argv and not argv[0].startswith("-") and "=" not in argv[0] else None
            if word not in entries:
                raise UserError(f"say what to do first: {', '.join(entries)} (got {word!r})")
            root, function = entries[word]
        else:
            root, function = entries
        if any(a.startswith("-") for a in argv):
            _hydra_flags(root, argv)  # --cfg job, --help, --info: Hydra's own
        else:
            function(load(root, argv))
    except UserError as e:
        sys.exit(_fail(str(e)))
    except KeyboardInterrupt:
        sys.exit(130)


def load(root: str, overrides: Sequence[str] = ()) -> Any:
    """Compose `conf/<root>.yaml` with `overrides` into its dataclass.

    Raises:
        UserError: a typo, a wrong type, a missing value or an impossible combination, in one line.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose(root, list(overrides))
        return _to_object(cfg, root)
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(_one_line(e, ROOTS[root], overrides)) from None


def freeze(cfg: Any, path: Path) -> None:
    """Write a resolved config as YAML, to read and to run again."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)), encoding="utf-8")
    aside.replace(path)


def thaw(path: Path, schema: type[T]) -> T:
    """Read what `freeze` wrote."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))  # type: ignore[return-value]


def _to_object(cfg: Any, root: str) -> Any:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"not given: {', '.join(missing)} (add {missing[0]}=... to the command line)")
    return OmegaConf.to_object(cfg)


def _hydra_flags(root: str, argv: list[str]) -> None:
    from hydra import main

    sys.argv[1:] = argv
    main(config_path="pkg://conf", config_name=root, version_base="1.3")(lambda cfg: None)()


def _one_line(error: Exception, schema: type, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's paragraphs as one sentence that names the key and the nearest right one."""
    causes: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in causes:
        causes.append(at)
        at = at.__cause__ or at.__context__
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
    text = " ".join(line.strip() for cause in causes[::-1] for line in str(cause).splitlines() if line.strip())
    if isinstance(error, MissingMandatoryValue):
        return text
    key = re.search(r"full_key: (\S+)", text)
    if key and ("not in" in text or "Could not override" in text):
        near = difflib.get_close_matches(key[1], _keys(schema), n=1)
        return f"{key[1]}: no such key" + (f", did you mean {near[0]}?" if near else "; --cfg job prints all keys")
    first = next((line.strip() for line in str(causes[-1]).splitlines() if line.strip()), str(error))
    if key:
        given = next((o for o in overrides if o.lstrip("+").startswith(key[1] + "=")), key[1])
        return f"{given}: {first}"
    whole = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return whole.split(" Set the environment variable HYDRA_FULL_ERROR")[0]


def _keys(schema: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(schema)
    out = []
    for f in fields(schema):
        out.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            out += _keys(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
    return out


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2

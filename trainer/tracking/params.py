"""A run's params at MLflow: the config of its first start, and what each later start has changed of it. No MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from conf.frozen import by_key
from trainer.run.folder import RunFolder
from trainer.run.redact import redact_tree

PARAM_CHARS = 6000  # MLflow's limit


def of_config(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The values that a config sets, as params; config.yaml has all."""
    values = by_key(redact_tree(cfg))
    return {key: _cut(_text(value)) for key, value in values.items() if value is not None and value != {}}


def of_starts(folder: RunFolder, starts: Iterable[int]) -> dict[str, str]:
    """`start.N.KEY`: `old -> new` of each value that start N has changed: a param is final, so each has its own."""
    changed = {f"start.{n}.{key}": text for n in starts for key, text in folder.facts(n).get("changed", {}).items()}
    return {key: _cut(str(text)) for key, text in redact_tree(changed).items()}


def _cut(text: str) -> str:
    return text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 1] + "…"


def _text(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    return value if isinstance(value, str) else json.dumps(value)

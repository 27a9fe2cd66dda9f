"""`make docs` writes docs/config.md from the dataclasses and from conf/; tests/test_docs.py fails if it is stale."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from conf.meanings import sections, settings, value_at, words
from conf.schema import CONF, defaults, groups, opening_comment, options, root_of
from data_pipeline.config import OrderConfig
from data_pipeline.examples.examples_config import PreviewConfig, RankConfig
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
from trainer.config.hf import ExportHfConfig, ImportHfConfig
from trainer.config.inference import EvaluateConfig, GenerateConfig
from trainer.config.node_check import NodeCheckConfig
from trainer.config.pretrain import PretrainConfig
from trainer.config.tracking import SyncConfig
from trainer.config.tuning.dpo import DpoConfig
from trainer.config.tuning.finetune import FinetuneConfig
from trainer.config.tuning.reward import RewardConfig
from trainer.config.tuning.sample_answers import SampleAnswersConfig
from trainer.config.tuning.sft import SftConfig

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
    PreviewConfig,
    RankConfig,
    PretrainConfig,
    SftConfig,
    RewardConfig,
    DpoConfig,
    FinetuneConfig,
    SampleAnswersConfig,
    GenerateConfig,
    EvaluateConfig,
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
group, `KEY=VALUE` sets a value; the command line has the last word. `--help` prints a command's part of this page,
`--cfg job` the whole config. Text is taken literally: `prompt='Hello, world'` needs no second pair of quotes.
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
    for key, hint, comment, default in settings(schema):
        group, _, name = key.partition(".")
        if group in chosen and name == "name":
            continue  # the group's own choice
        value = value_at(said, key) if default is None else default
        rows.append(f"| `{key}` | {wording(hint)} | {shown(value)} | {cell(hint, comment)} |")
    notes = [f"`{prefix}.*`: {doc}" for prefix, doc in sections(schema)]
    return "\n".join([*rows, "", *(f"{note}\n" for note in notes)])


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


def cell(hint: Any, comment: str) -> str:
    said = [comment] * bool(comment) + [f"`{word}`: {text}" for word, text in words(hint).items() if text]
    return "; ".join(said).replace("|", "\\|")


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value == "???":
        return "must be given"
    written = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value
    return f"`{written}`"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")

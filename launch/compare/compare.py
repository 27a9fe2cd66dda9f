"""Entry: `python -m launch.compare runs/a runs/b output=compare.png`: what differs in the configs of runs, and their
training and validation loss over steps, tokens and hours.

From the files of the run folders alone, on any machine that sees them: no torch, no MLflow, no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.frozen import by_key, peek
from data_pipeline.files import publish
from launch.compare.curves import read_curves
from launch.compare.picture import draw
from launch.config import CompareConfig
from launch.status.text import harmless
from trainer.run.folder import RunFolder
from trainer.tracking.plots import check_picture

NOT_THERE = "-"


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The folders of a command line, and its other words. A folder may be named runs/lr=0.1: no key has a slash."""
    folders: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        key, mark, _ = word.partition("=")
        other = word.startswith("-") or before == "--cfg" or (mark and "/" not in key)
        (others if other else folders).append(word)
    return folders, others


def compare(cfg: CompareConfig, folders: Sequence[str]) -> None:
    """Print what differs, and draw the curves unless `output` is null.

    Raises:
        UserError: fewer than two run folders, one that is none, or a picture that cannot be drawn there.
    """
    runs = named(folders)
    if cfg.output is not None:
        check_picture(Path(cfg.output), "output")
    print("\n".join(difference(runs)), flush=True)
    if cfg.output is None:
        return
    curves = {name: read_curves(run.metrics) for name, run in runs.items()}
    for problem in [problem for curve in curves.values() for problem in curve.problems]:
        print(harmless(problem))
    if not any(curve.points for curve in curves.values()):
        print("no curve: none of these runs has logged a loss")
        return
    publish(Path(cfg.output), draw(curves))
    print(f"drawn: {harmless(cfg.output)}")


def named(folders: Sequence[str]) -> dict[str, RunFolder]:
    """The runs by the names of their folders; by their paths if two have the same name."""
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    if len(paths) < 2:
        raise UserError(f"{len(paths)} run folders are given, compare takes two or more: launch.compare runs/a runs/b")
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        if not (RunFolder(path).config.exists() or RunFolder(path).metrics.exists()):
            raise UserError(f"{path} has no config.yaml and no metrics.jsonl: give the run.dir of a run")
    unique = len({path.resolve().name for path in paths}) == len(paths)
    return {path.resolve().name if unique else str(path): RunFolder(path) for path in paths}


def difference(runs: Mapping[str, RunFolder]) -> list[str]:
    """A table of the keys whose values differ, a column for each run; a line for each config that cannot be read."""
    configs: dict[str, dict[str, Any]] = {}
    lines = []
    for name, run in runs.items():
        try:
            configs[name] = by_key(peek(run.config))
        except UserError as e:
            lines.append(harmless(f"{run.config} cannot be read: {e}: its values are not compared"))
    keys = sorted(set().union(*configs.values()))
    rows = [[key, *(said(config, key) for config in configs.values())] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if len(configs) > 1:
        lines += table([["", *configs], *differing]) if differing else ["the configs are the same"]
    return lines


def said(config: Mapping[str, Any], key: str) -> str:
    """The value of a key as a command line takes it."""
    if key not in config:
        return NOT_THERE
    value = config[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns aligned."""
    cells = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in cells]

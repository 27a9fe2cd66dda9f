"""`python -m data_pipeline.examples rank`: ranks of answers by a function of the user's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.corpus.document import Dropped
from data_pipeline.examples.examples_config import RankConfig
from data_pipeline.examples.records import Record, records
from data_pipeline.files import check_output, publish

Judge = Callable[[Any, list[str]], Sequence[float]]


def rank(cfg: RankConfig) -> None:
    """Write each record with `ranks`: 1 for the answer with the largest number, equal ones for equal numbers.

    Raises:
        UserError: no such function, output or record, or a function that fails or returns no number for an answer.
    """
    check_output(cfg.output)
    output = Path(cfg.output)
    if output.exists():
        raise UserError(f"output={cfg.output} is there: give another one, or move it away")
    judge, lines = _function(cfg.by), []
    for record in records(cfg.path):
        if isinstance(record, Dropped):
            raise UserError(f"{record.path}: {record.reason}: mend the line, or leave it out")
        lines.append(json.dumps({**record.fields, "ranks": _ranks(record, cfg.by, judge)}, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"path={cfg.path}: no record there: give a file of some")
    output.parent.mkdir(parents=True, exist_ok=True)
    publish(output, "".join(lines).encode())
    print(f"ranked the answers of {len(lines):,} prompts: {output}")


def _function(name: str) -> Judge:
    """The function `module:function`, of a module in the current folder or an installed one."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"by={name}: {e}: give module:function, of a module in this folder or an installed one") from e
    if not callable(found):
        raise UserError(f"by={name} is {type(found).__name__}, which cannot be called: give a function")
    return found


def _ranks(record: Record, name: str, judge: Judge) -> list[int]:
    responses = record.fields.get("responses")
    if "prompt" not in record.fields or not isinstance(responses, list):
        raise UserError(f"{record.path}: no prompt with a list of responses: give records of both")
    try:
        numbers = [float(number) for number in judge(record.fields["prompt"], list(responses))]
    except Exception as e:  # it is the user's code
        raise UserError(f"{record.path}: by={name} raised {type(e).__name__}: {e}") from e
    if len(numbers) != len(responses) or any(map(math.isnan, numbers)):
        raise UserError(f"{record.path}: by={name} returned {numbers} for {len(responses)} answers: one number each")
    places = {number: place for place, number in enumerate(sorted(set(numbers), reverse=True), 1)}
    return [places[number] for number in numbers]

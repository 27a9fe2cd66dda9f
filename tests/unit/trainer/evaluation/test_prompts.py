"""Demonstrations of a task that names a file for them, and the instruction before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from tests.helpers.evaluation_data import Documents, Row, write_rows
from tests.helpers.seeds import seeded
from trainer.evaluation.evaluation import Plan, plan_task
from trainer.evaluation.tasks.find import load_task

TRAIN, TEST = 6, 9


def planned(folder: Path, shots: int, **body: Any) -> tuple[Plan, list[Row], list[str]]:
    """The task, the documents that it asks about, and each document of its demonstrations as a prompt shows it."""
    documents = Documents(seeded())
    rows = [{**row, "goal": f"{i} {row['goal']}"} for i, row in enumerate(documents.piqa(TRAIN + TEST))]
    write_rows(folder / "train.jsonl", rows[:TRAIN])
    write_rows(folder / "test.jsonl", rows[TRAIN:])
    files: dict[str, Any] = {
        "data": {"files": {"test.jsonl": None}, "format": "jsonl"},
        "demonstrations": {"files": {"train.jsonl": None}, "format": "jsonl"},
        "completion": {"context": "{{ goal }}:", "continuation": " {{ sol1 }}"},
    }
    path = folder / "mine.yaml"
    path.write_text(json.dumps({"about": "x", **files, **body}), encoding="utf-8")
    plan = plan_task("mine", load_task(str(path)), str(folder), shots=shots, limit=None, seed=3)
    return plan, rows[TRAIN:], [f"{row['goal']}: {row['sol1']}" for row in rows[:TRAIN]]


def test_demonstrations_come_from_their_own_file(tmp_path: Path) -> None:
    """As many as asked for, none twice, and none of the documents that are asked about; with K = all of them too."""
    for shots in (1, 4, TRAIN):
        plan, asked, pool = planned(tmp_path, shots)
        drawn = [plan.prompts.before(q.number, lambda _: True).split("\n\n")[:-1] for q in plan.questions]
        assert [q.document for q in plan.questions] == asked and len(drawn) == TEST
        assert all(len(some) == len(set(some)) == shots and set(some) <= set(pool) for some in drawn)
        assert len({tuple(some) for some in drawn}) > 1  # each question has a draw of its own
    with pytest.raises(UserError, match=rf"shots={TRAIN + 1}: task mine has {TRAIN} documents to show"):
        planned(tmp_path, TRAIN + 1)


def test_a_file_of_demonstrations_is_read_for_shots_alone(tmp_path: Path) -> None:
    planned(tmp_path, 1)
    missing = {"files": {"absent.jsonl": None}, "format": "jsonl"}
    plan, _, _ = planned(tmp_path, 0, demonstrations=missing)
    assert plan.prompts.before(0, lambda _: True) == ""
    with pytest.raises(UserError, match=r"no file .*absent.jsonl"):
        planned(tmp_path, 1, demonstrations=missing)


@pytest.mark.parametrize("shots", [0, 3])
def test_an_instruction_stands_once_at_the_start(shots: int, tmp_path: Path) -> None:
    """Before all demonstrations, and before the question where there are none or none fits."""
    plan, _, pool = planned(tmp_path, shots, instruction="Say how.", separator="\n")
    for q in plan.questions:
        first, *others = plan.prompts.before(q.number, lambda _: True).split("\n")
        assert first == "Say how." and len(others[:-1]) == shots and set(others[:-1]) <= set(pool) and others[-1] == ""
    assert plan.prompts.before(0, lambda _: False) == "Say how.\n"
    assert plan.prompts.before(0, lambda prompt: prompt.count("\n") <= 2).count("\n") == min(shots, 1) + 1

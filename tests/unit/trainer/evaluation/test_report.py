"""The report of an evaluation: JSON that any reader takes, a file of samples for each task, a table for people."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from conf.errors import UserError
from trainer.evaluation.kinds.kind import Outcome
from trainer.evaluation.report import publish_report, result_of, table
from trainer.evaluation.tasks.description import Reference

ONE = Outcome(1, {"acc": 1.0, "acc_stderr": math.nan, "ppl": math.inf}, [{"document": 0}], {"divisor": "3 words"})
MANY = Outcome(40, {"acc": 0.25, "acc_stderr": 0.07}, [{"document": i} for i in range(40)], {"shots": 2})
REFERENCES = (
    Reference("small", 100, "acc", 0.3, "a paper"),
    Reference("large", 1000, "acc", 0.4, "a paper"),
    Reference("large", 1000, "acc", 0.5, "a paper", shots=9),
)


def test_what_is_no_number_is_null() -> None:
    assert result_of(ONE) == {"n": 1, "acc": 1.0, "acc_stderr": None, "ppl": None, "divisor": "3 words"}
    assert json.loads(json.dumps(result_of(ONE), allow_nan=False)) == result_of(ONE)


def test_each_task_has_its_own_samples(tmp_path: Path) -> None:
    """Also a task of ours beside the harness's of the same name, and files of one name in two folders."""
    tasks = {"piqa": ONE, "lm_eval/piqa": MANY, "/a/mine.yaml": ONE, "/b/mine.yaml": MANY}
    path = publish_report(tmp_path, {"seed": 0}, {"results": {}}, tasks)
    samples = {len(f.read_text().splitlines()): f.name for f in tmp_path.glob("samples-*.jsonl")}
    assert len(list(tmp_path.glob("samples-*.jsonl"))) == 4 and set(samples) == {1, 40}
    assert json.loads(path.read_text()) == {"results": {}, "settings": {"seed": 0}}
    assert publish_report(tmp_path, {"seed": 1}, {"results": {}}, tasks) != path


def test_a_table_has_figures_of_the_nearest_size() -> None:
    """With demonstrations or without, as the task was run."""
    results = {"a": result_of(MANY), "b": result_of(ONE)}
    lines = table(results, {"a": REFERENCES}, 900).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "±", "n", "reported", "by", "others"]
    assert lines[1].split() == ["a", "acc", "0.25", "0.07", "40", "0.5", "large", "(a", "paper)"]
    assert lines[2].split() == ["b", "acc", "1", "1"]
    assert lines[3:] == ["a: shots 2", "b: divisor 3 words"]
    plain = table({"a": {"n": 40, "acc": 0.25}}, {"a": REFERENCES}, 200)
    assert plain.splitlines()[1].endswith("0.3 small (a paper)")


def test_a_table_of_clean_and_dirty_questions() -> None:
    parts = {"clean": {"n": 30, "share": 0.75, "acc": 0.2}, "dirty": {"n": 10, "share": 0.25, "acc": 0.4}}
    divided = Outcome(40, {"acc": 0.25, "acc_stderr": 0.07}, [], {"ngram": 13}, parts)
    counted = {"clean": {"n": 1, "share": 1.0}, "dirty": {"n": 0, "share": 0.0}}
    results = {"a": result_of(divided), "b": result_of(Outcome(1, {"ppl": 9.5}, [], {}, counted)), "c": result_of(MANY)}
    assert results["a"]["clean"] == parts["clean"] and results["b"]["dirty"] == counted["dirty"]
    lines = [line.split() for line in table(results, {}, 1).splitlines()[5:]]
    assert lines[0][:3] == ["task", "metric", "all"] and len(lines) == 6
    assert lines[1] == ["a", "acc", "0.25", "0.2", "30", "0.4", "10", "25.0%", "-20.0%"]
    assert lines[2] == ["b", "1", "0", "0.0%"]
    assert [" ".join(line) for line in lines[4:]] == ["a: ngram 13", "c: shots 2"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/x: .*give output=, another folder"):
        publish_report(tmp_path / "file" / "x", {}, {}, {})

"""Ranks of answers by a function of the user's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.examples.examples_config import ExamplesConfig, RankConfig
from data_pipeline.examples.rank import rank
from data_pipeline.examples.read import read_preferences
from tests.helpers.chat import small_vocabulary, write_lines
from tests.helpers.seeds import seeded

JUDGES = """
def longer(prompt, responses):
    return [len(r) for r in responses]
def fails(prompt, responses):
    raise KeyError(prompt)
def few(prompt, responses):
    return [1.0]
def no_number(prompt, responses):
    return [float("nan") for _ in responses]
word = "none"
"""


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"judges_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_ranks_are_those_of_the_numbers(judges: str, tmp_path: Path) -> None:
    """The best number is rank 1, equal numbers share one; other fields stay; the file is read as comparisons."""
    rng = random.Random(seeded())
    given = []
    for i in range(20):
        answers = ["x" * rng.randint(1, 4) + rng.choice("abc") for _ in range(rng.randint(2, 6))]
        given.append({"prompt": f"{i}", "responses": [*answers, "longest"], "ended": [True]})
    path = write_lines(tmp_path / "a.jsonl", given)
    rank(RankConfig(str(path), f"{judges}:longer", str(tmp_path / "out" / "b.jsonl")))
    found = [json.loads(line) for line in (tmp_path / "out" / "b.jsonl").read_text().splitlines()]
    for before, after in zip(given, found, strict=True):
        ranks = after.pop("ranks")
        assert after == before
        lengths = [len(answer) for answer in before["responses"]]
        assert ranks == [1 + len({n for n in lengths if n > length}) for length in lengths]
    read = read_preferences(ExamplesConfig(path=str(tmp_path / "out" / "b.jsonl")), small_vocabulary(), 1024)
    assert len(read.items) == 20 and all(item.ranks[-1] == 0 for item in read.items)


@pytest.mark.parametrize(
    ("by", "line"),
    [
        ("none", "give module:function"),
        ("JUDGES:absent", "has no attribute 'absent'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("JUDGES:word", "cannot be called"),
        ("JUDGES:fails", "a.jsonl:1: by=JUDGES:fails raised KeyError: 'q'"),
        ("JUDGES:few", "returned [1.0] for 2 answers"),
        ("JUDGES:no_number", "returned [nan, nan] for 2 answers"),
    ],
)
def test_a_wrong_function_is_one_line(by: str, line: str, judges: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "q", "responses": ["a", "b"]}])
    with pytest.raises(UserError) as told:
        rank(RankConfig(str(path), by.replace("JUDGES", judges), str(tmp_path / "b.jsonl")))
    assert line.replace("JUDGES", judges) in str(told.value)
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no record there"),
        ("{broken", "a.jsonl:1: not JSON"),
        ('{"prompt": "q"}', "no prompt with a list of responses"),
        ('{"responses": ["a", "b"]}', "no prompt with a list of responses"),
    ],
)
def test_records_that_cannot_be_ranked_are_named(text: str, line: str, judges: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=line):
        rank(RankConfig(str(tmp_path / "a.jsonl"), f"{judges}:longer", str(tmp_path / "b.jsonl")))


def test_an_output_that_is_there_stays(judges: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "q", "responses": ["a", "b"]}])
    (tmp_path / "b.jsonl").write_text("years")
    with pytest.raises(UserError, match="is there: give another one"):
        rank(RankConfig(str(path), f"{judges}:longer", str(tmp_path / "b.jsonl")))
    assert (tmp_path / "b.jsonl").read_text() == "years"

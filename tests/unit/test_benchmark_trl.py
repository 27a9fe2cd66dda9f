"""The benchmark beside TRL: its examples, its turns and its figures; the whole of it where TRL has an environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.examples.read import Preference
from data_pipeline.examples.templates import Example
from tests.benchmarks import trl, trl_inputs, trl_side, tuning_side
from tests.benchmarks.turns import ROOT, Side

COUNTS = """
import sys, time
from tests.benchmarks.turns import Pace
pace, step = Pace(sys.argv[1]), 0
while True:
    pace.report |= {"done": step}
    pace.step()
    step += 1
    time.sleep(0.01)
"""


def test_a_side_makes_the_steps_of_its_turns(tmp_path: Path) -> None:
    """It reports their time, and ends when it is closed."""
    side = Side([sys.executable, "-c", COUNTS], os.environ, tmp_path / "side.log")
    try:
        assert side.ready() == {"done": 0}
        reports = [side.turn(steps) for steps in (3, 2)]
        assert [report["done"] for report in reports] == [3, 5]
        assert reports[0]["seconds"] >= 0.03 and reports[0]["cpu_s"] < reports[0]["seconds"] + 0.1
    finally:
        side.close()
    assert side.process.returncode == 0


def test_a_side_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    side = Side([sys.executable, "-c", "raise SystemExit('no model')"], os.environ, tmp_path / "side.log")
    try:
        with pytest.raises(RuntimeError, match="no model"):
            side.ready()
    finally:
        side.close()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_records_follow_from_the_seed_and_fit(kind: str) -> None:
    found = trl_inputs.records(kind, 50, 3)
    assert found == trl_inputs.records(kind, 50, 3) != trl_inputs.records(kind, 50, 4) and len(found) == 50
    assert all(len(json.dumps(record).encode()) < 2 * trl.DEFAULTS["n_ctx"] for record in found)


def test_both_sides_get_the_same_ids() -> None:
    ids = np.arange(4, dtype=np.int32)
    told = tuning_side.conversation(Example(ids, np.array([False, False, True, True])))
    assert trl_side.conversation(told) == {"input_ids": [0, 1, 2, 3], "labels": [-100, -100, 2, 3]}
    assert trl.tokens_of("sft", told) == 4
    item = Preference(ids[:1], (ids[1:2], ids[2:]), np.array([1, 0], np.int32))  # the second answer is better
    told = tuning_side.comparison(item)
    assert trl_side.whole(told) == {"chosen_ids": [0, 2, 3], "rejected_ids": [0, 1]}
    assert trl_side.parts(told) == {"prompt_ids": [0], "chosen_ids": [2, 3], "rejected_ids": [1]}
    assert trl.tokens_of("reward", told) == 5


def test_the_ratio_is_that_of_tokens_a_second() -> None:
    turn = {"tokens": 100, "seconds": 2.0, "cpu_s": 1.0}
    found = trl.summary({"ours": [turn] * 3, "theirs": [turn | {"tokens": 50}] * 2 + [turn]})
    assert found["tokens_per_s"] == {"ours": 50.0, "theirs": 25.0}
    assert found["ratio"] == found["cpu_ratio"] == 2.0 and found["ratio_lower_95"] == 1.0
    assert found["tokens"] == {"ours": [100] * 3, "theirs": [50, 50, 100]}
    lines = trl.markdown({"kinds": {"dpo": {"loss_apart": 2e-7, "equal": found}}}).splitlines()
    assert lines[2] == "| `dpo` | equal | 2.0e-07 | 50 | 25 | 2.00 | 1.00 | 2.00 | 1.00 |" and len(lines) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_trls() -> None:
    """The whole benchmark, as small as it goes: TRL_PYTHON is the interpreter of an environment with TRL."""
    if not (python := os.environ.get("TRL_PYTHON")):
        pytest.skip("TRL_PYTHON is not set: TRL has an environment of its own")
    words = [f"python={python}", "rounds=1", "steps=1", "layers=1", "width=64"]
    argv = [sys.executable, "-m", "tests.benchmarks.trl", *words]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert ended.returncode == 0 and ended.stdout.count("\n") == 1, ended.stderr[-3000:]
    result = json.loads(ended.stdout)
    assert set(result) >= {"hardware", "load", "versions", "trl_versions", "seed", "bars"}
    assert list(result["kinds"]) == ["sft", "reward", "dpo"]
    for found in result["kinds"].values():
        assert found["loss_apart"] <= result["bars"]["loss_apart"] and len(found["losses"]["ours"]) == 20
        for timed in (found["equal"], found["defaults"]):
            assert min(timed["ratio"], *timed["tokens_per_s"].values()) > 0

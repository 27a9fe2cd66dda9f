"""`python -m trainer.evaluation.harness`: lm-evaluation-harness' own command line over one of our checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.evaluation_data import Documents, random_checkpoint, write_rows
from tests.helpers.gpt_twins import log_p
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded

pytest.importorskip("lm_eval", reason="the eval extra is not installed")


@pytest.mark.slow
def test_the_harness_own_command_scores_our_checkpoint(tmp_path: Path) -> None:
    """A task of a folder of the user's, from a local file: its accuracy by transformers' probabilities."""
    from transformers import GPT2LMHeadModel

    from data_pipeline.tokenizer.tokenizer import Tokenizer

    seed = seeded()
    hf, checkpoint = random_checkpoint(tmp_path, 128, seed, scale=10.0)
    rows = Documents(seed).piqa(15)
    file = write_rows(tmp_path / "data/validation.jsonl", rows)
    task: dict[str, Any] = {
        "task": "goals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{goal}}",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/goals.yaml").write_text(json.dumps(task), encoding="utf-8")
    how = ["--model", "gradus", "--model_args", f"checkpoint={checkpoint}", "--tasks", "goals"]
    where = ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "trainer.evaluation.harness", *how, *where]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]

    theirs, encode = GPT2LMHeadModel.from_pretrained(hf).eval(), Tokenizer.load("gpt2").encode
    right = []
    for row in rows:
        goal = encode(row["goal"])
        sums = [log_p(theirs, goal, encode(f"{row['goal']} {row[k]}")[len(goal) :])[0].sum() for k in ("sol1", "sol2")]
        right.append(int(sums[1] > sums[0]) == row["label"])
    (report,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(report.read_text())["results"]["goals"]
    assert found["acc,none"] == pytest.approx(sum(right) / len(right), abs=1e-9) and 0 < found["acc,none"] < 1, seed

"""Scores on tasks during training: what cannot be scored is refused before any work, and asking changes no model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.evaluation_data import Documents, write_rows
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig
from trainer.config.pretrain import EvalConfig
from trainer.distributed.mesh import Mesh
from trainer.evaluation.task_scores import TaskScores
from trainer.model.gpt import GPT
from trainer.model.init import initialise

MODEL = ModelConfig("test", n_layer=1, n_head=2, n_embd=32, n_ctx=64, vocab_size=50257, dropout=0.1, init_std=0.4)
CHOICES = {"options": ["{{ sol1 }}", "{{ sol2 }}"], "correct": "label", "context": "{{ goal }}"}
GENERATION = {"context": "{{ goal }}", "answers": "[sol1]", "metric": "f1", "max_new_tokens": 5}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("gpt2")


def described(folder: Path, name: str = "mine", sha256: str | None = None, **body: Any) -> str:
    """A task of six documents."""
    write_rows(folder / "a.jsonl", Documents(seeded()).piqa(6))
    path = folder / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    data = {"files": {"a.jsonl": sha256}, "format": "jsonl"}
    path.write_text(json.dumps({"about": "x", "data": data, **body}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lamda", r"\[lamda\]: no task of conf/task/ \(did you mean lambada\?\)"),
        ("mmlu", r"none of lm-evaluation-harness, .* python -m trainer.evaluate checkpoint=RUN tasks=\[mmlu\]"),
        ("lm_eval/piqa", r"python -m trainer.evaluate checkpoint=RUN tasks=\[lm_eval/piqa\]"),
        ("lambada", r"no file .*lambada_test.jsonl \(sha256 .*\): give eval.task_data=, the folder"),
        ("none.yaml", r"eval.tasks=\[none.yaml\]: none.yaml: "),
    ],
)
def test_a_task_that_is_not_there_is_refused(name: str, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=message):
        TaskScores(EvalConfig(0, tasks=[name], task_data=str(tmp_path)), tokenizer, MODEL, 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"choices": CHOICES, "sha256": "0" * 64}, r"has sha256 .*, not 0+: give the original file"),
        ({"choices": CHOICES, "shots": 6}, r"shots=6: task mine has 5 documents to show: give at most 5"),
        ({"generation": GENERATION | {"max_new_tokens": 64}}, r"max_new_tokens=64 leave .* n_ctx=64: give at most 63"),
        ({"choices": CHOICES | {"correct": "label + 5"}}, r"`correct: label \+ 5` gives [56] for 2 options"),
        ({"choices": CHOICES, "name": "a&b"}, r"'a&b' is no name of a metric: rename the file"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(
    body: dict[str, Any], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    task = described(tmp_path, **body)
    with pytest.raises(UserError, match=message):
        TaskScores(EvalConfig(0, tasks=[task], task_data=str(tmp_path)), tokenizer, MODEL, 2)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tasks = [described(tmp_path / folder, choices=CHOICES) for folder in ("", "b")]
    with pytest.raises(UserError, match="two tasks are mine in the metrics: rename one of the files"):
        TaskScores(EvalConfig(0, tasks=tasks, task_data=str(tmp_path)), tokenizer, MODEL, 2)


def test_asking_changes_nothing_of_a_model(
    tmp_path: Path, tokenizer: Tokenizer, mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its mode nor the generator of dropout; twice the same figures, no file, no bar, and a sign at each batch.

    Of a loss that is not finite there are no figures.
    """
    kinds = {"choose": {"choices": CHOICES, "shots": 1}, "write": {"generation": GENERATION}}
    tasks = [described(tmp_path, name, **body) for name, body in kinds.items()]
    scores = TaskScores(EvalConfig(0, tasks=tasks, tasks_limit=5, task_data=str(tmp_path)), tokenizer, MODEL, 2)
    model = GPT(MODEL, mesh).train()
    initialise(model, MODEL, seeded())
    capsys.readouterr()
    files, state, touched = set(tmp_path.rglob("*")), torch.get_rng_state(), list[int]()
    row, line = scores.find(model, 1.0, lambda: touched.append(1))
    assert torch.equal(torch.get_rng_state(), state) and model.training and torch.is_grad_enabled()
    assert set(tmp_path.rglob("*")) == files and capsys.readouterr() == ("", "")
    assert len(touched) > 5 and row["task/choose/n"] == row["task/write/n"] == 5
    assert row.keys() >= {"task/choose/acc", "task/choose/acc_stderr", "task/write/f1", "task/write/f1_stderr"}
    assert line.startswith(f"tasks: choose acc {row['task/choose/acc']:.4f} ± ") and ", write f1 " in line
    assert scores.find(model, 1.0, lambda: None)[0] == row
    assert scores.find(model, math.nan, lambda: None) == ({}, "no scores on tasks: the loss is nan")

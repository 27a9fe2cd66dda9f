"""Whole runs of `python -m trainer.reward`: one that is killed, the bias that it ends with, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.ranked import vowel_records, write_records
from tests.helpers.ranks import Process, run_ranks
from tests.system.runs import finish
from tests.system.tunings import export, launch, small_base, succeed
from trainer.checkpoint.files import SavedWeights
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal

STEPS = 8
EXACT = ("train/", "val/", "optim/", "data/", "reward/")
TINY = (
    "model=test",
    "model.n_ctx=32",
    "model.dropout=0.1",
    "batch_size=8",
    "micro_batch_size=2",
    "precision=fp32",
    "tracking=none",
    "held_out.fraction=0.2",
    "held_out.every=5",
    "checkpoint.every_steps=3",
    "optim.lr=1e-3",
    "epochs=0",
    f"max_steps={STEPS}",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base to start from, comparisons and demonstrations."""
    root = tmp_path_factory.mktemp("reward")
    small_base(root, "model.n_ctx=32", steps=1)
    records = vowel_records(np.random.default_rng(5), 90)
    write_records(root / "ranks.jsonl", records)
    turns = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "aeiou" * n}] for n in (1, 2, 3)]
    write_records(root / "shown.jsonl", [{"messages": messages} for messages in turns])
    return root


def argv(files: Path, run_dir: Path, *overrides: str) -> list[str]:
    given = (f"run.dir={run_dir}", f"init_from={files / 'base'}", f"examples.path={files / 'ranks.jsonl'}")
    return [*TINY, *given, "model.vocab_size=257", *overrides]


def start(words: list[str], ranks: int = 2) -> list[Process]:
    return launch("reward", words, ranks)


def train(words: list[str], ranks: int = 2) -> None:
    succeed(start(words, ranks))


def story(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """What must be equal, of every step."""
    rows = read_journal(run_dir / "metrics.jsonl")
    return [(row.step, {k: v for k, v in row.metrics.items() if k.startswith(EXACT)}) for row in rows]


@pytest.mark.slow
def test_the_zero_bias_is_logged_saved_and_set_once(files: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(argv(files, run))
    assert len(story(run)) == STEPS
    last = story(run)[-1][1]
    names = {"ranking", "accuracy", "score", "score_square"}
    assert {"train/loss/ranking", *(f"train/{name}" for name in names - {"ranking"})} <= last.keys()
    assert {"val/accuracy", "reward/zero_bias", "reward/score_mean", "reward/score_std"} <= last.keys()
    latest = RunFolder(run).latest()
    assert latest is not None
    bias = float(SavedWeights(latest)["head.bias"])
    assert bias == pytest.approx(last["reward/zero_bias"], rel=1e-6)
    before = story(run)
    train(argv(files, run))  # what is over is not finished again
    assert story(run) == before


def mean_of_shown(words: list[str]) -> dict[str, Any]:
    """On a rank: a run's printed lines and the mean score of its demonstrations by its last weights."""
    from trainer.tuning import zero_bias

    found: list[float] = []
    own = zero_bias.set_zero_bias

    def again(engine: Any, demonstrations: Any, answers: Any, size: int, on_progress: Any) -> dict[str, float]:
        figures = own(engine, demonstrations, answers, size, on_progress)
        found.append(own(engine, demonstrations, demonstrations, size, on_progress)["reward/score_mean"])
        found.append(demonstrations.number)
        return figures

    zero_bias.set_zero_bias = again
    sys.argv = ["trainer.reward", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module("trainer.reward", run_name="__main__", alter_sys=True)
    return {"lines": out.getvalue().splitlines(), "mean": found[0], "number": found[1]}


@pytest.mark.parametrize("shown", [True, False])
def test_demonstrations_are_given_or_the_best_answers(shown: bool, files: Path, tmp_path: Path) -> None:
    """A line at the start tells what lengths alone would reach, and one at the end the bias and the spread."""
    words = argv(files, tmp_path / "run", "max_steps=2", "held_out.every=0")
    words += [f"demonstrations={files / 'shown.jsonl'}"] if shown else []
    [got] = run_ranks(1, "tests.system.test_reward:mean_of_shown", words=words)
    assert abs(got["mean"]) < 1e-5
    assert (got["number"] == 3) is shown and got["number"] > 2
    assert any("the longer answer is the better one in" in line and "held-out pairs" in line for line in got["lines"])
    assert any(line.startswith("step 2/2  reward/zero_bias ") and "score_std" in line for line in got["lines"])
    assert any(line.startswith("demonstrations: examples: 3 of 3") for line in got["lines"]) is shown


def scores_in_transformers(exported: str, conversations: list[list[dict[str, str]]]) -> list[float]:
    """On a rank: the score of each conversation by transformers' hidden states and the head's file."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    head = load_file(Path(exported) / "head.safetensors")
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModel.from_pretrained(exported).eval()
    scores = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model(ids).last_hidden_state[0, -1]
        scores.append(float(last @ head["head.weight"][0] + head["head.bias"][0]))
    return scores


@pytest.mark.slow
def test_an_exported_reward_model_scores_in_transformers(files: Path, tmp_path: Path) -> None:
    """Its demonstrations have the mean 0 there too."""
    shown = files / "shown.jsonl"
    run, out = tmp_path / "run", tmp_path / "out"
    train(argv(files, run, f"demonstrations={shown}", "optim.lr=1e-2"), ranks=1)
    export(run, out)
    messages = [json.loads(line)["messages"] for line in shown.read_text().splitlines()]
    target = "tests.system.test_reward:scores_in_transformers"
    [scores] = run_ranks(1, target, exported=str(out), conversations=messages)
    assert np.std(scores) > 1e-2 and abs(np.mean(scores)) < 1e-5, scores


def test_equal_prompts_are_held_out_together(files: Path, tmp_path: Path) -> None:
    """Each prompt stands in five comparisons, and is on one side."""
    records = [json.loads(line) for line in (files / "ranks.jsonl").read_text().splitlines()]
    five = [record | {"prompt": records[n // 5]["prompt"]} for n, record in enumerate(records)]
    path = write_records(tmp_path / "five.jsonl", five)
    words = argv(files, tmp_path / "run", f"examples.path={path}", "held_out.every=0", "held_out.fraction=0.5")
    [(train_prompts, held_out)] = run_ranks(1, "tests.system.test_reward:sides", words=words)
    assert train_prompts and held_out and not set(map(tuple, train_prompts)) & set(map(tuple, held_out))


def sides(words: list[str]) -> list[list[list[int]]]:
    """On a rank: the prompts of the comparisons to train on, and of those held out."""
    from conf.schema import load
    from trainer import reward
    from trainer.config.tuning.reward import RewardConfig

    kept: list[Any] = []
    fake: Any = reward
    fake.run_task = lambda cfg, world, work, make_task, lines: kept.append(make_task)
    fake.ranking = lambda checked, demonstrations: checked
    reward.reward(load(RewardConfig, words))
    checked = kept[0]()
    return [[item.prompt.tolist() for item in some] for some in (checked.train, checked.held_out)]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("compile=auto", "compile=auto: each number of rows"),
        ("demonstrations=/nowhere", "/nowhere"),
        ("examples.path={files}/shown.jsonl", "holds no comparisons"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(override: str, line: str, files: Path, tmp_path: Path) -> None:
    [(code, err)] = finish(start(argv(files, tmp_path / "run", override.format(files=files)), ranks=1))
    assert code == 2 and line in err, err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

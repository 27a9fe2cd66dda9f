"""What a run finds out at its validations changes nothing of its training, and is the same after a resume."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from conf.errors import UserError
from data_pipeline.manifest import TOKENIZER
from data_pipeline.remote.source import open_source
from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.seeds import seeded
from tests.helpers.stream_truth import shards_of
from tests.system.mixtures import in_turn
from tests.system.runs import letters, make_data
from tests.system.test_resume import story, weights
from trainer.checkpoint.find import model_of
from trainer.config.inference import EvaluateConfig
from trainer.config.model import ModelConfig
from trainer.config.pretrain import EvalConfig, SamplesConfig
from trainer.data.sources import Sources, check_sources
from trainer.evaluate import evaluate
from trainer.generate import load_model
from trainer.inference.requests import Sampling
from trainer.inference.sampler import sample
from trainer.model.gpt import GPT
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal
from trainer.samples import Samples

COMMON = ("model.vocab_size=257", "eval.every=2", "tokens_per_step=256", "model.dropout=0.1")
PROMPTS = ["", "ab", "ab", "a text"]
WATCHED = ("eval.train_windows=5", f"eval.samples.prompts={json.dumps(PROMPTS)}", "eval.samples.tokens=9")
N_CTX = 64
WORDS = "a stone of the river walks in night. she looked café naïve 1984".split()
KINDS = {
    "choose": {"choices": {"context": "{{ a }}", "options": ["{{ b }}", "{{ c }}"], "correct": "label"}, "shots": 1},
    "complete": {"completion": {"context": "{{ a }}", "continuation": " {{ b }}"}},
    "count": {"perplexity": {"unit": "words", "text": "{{ a }} {{ b }} {{ a }} {{ c }}"}},
    "write": {"generation": {"context": "{{ a }}", "answers": "[d]", "metric": "exact_text", "max_new_tokens": 5}},
}
"""A task of each kind, of the same documents."""


def scored(folder: Path) -> tuple[str, ...]:
    """The settings of a run that scores its model on KINDS: after step 3, and at its end."""
    files = [str(folder / f"{name}.yaml") for name in KINDS]
    return (f"eval.tasks=[{','.join(files)}]", "eval.tasks_every=3", "eval.tasks_limit=7", f"eval.task_data={folder}")


def write_tasks(folder: Path, run: Path) -> None:
    """Every second document has what the run's last checkpoint writes for an answer."""
    draws, (tokenizer, model) = random.Random(seeded()), _last(run)
    rows = [{**{key: " ".join(draws.choices(WORDS, k=2)) for key in "abc"}, "label": i % 2} for i in range(9)]
    ids = [tokenizer.encode(str(row["a"])) for row in rows]
    new = sample(model, ids, Sampling(temperature=0.0), max_new_tokens=5, eot=256)
    for i, (row, written) in enumerate(zip(rows, new, strict=True)):
        row["d"] = "no" if i % 2 else tokenizer.decode([t for t in written if t != 256]).split("\n")[0]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, body in KINDS.items():
        described = {"about": "x", "data": {"files": {"rows.jsonl": None}, "format": "jsonl"}, **body}
        (folder / f"{name}.yaml").write_text(json.dumps(described), encoding="utf-8")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluations beside its validation, one with them, and one with them in two starts."""
    root = tmp_path_factory.mktemp("evaluations")
    data = f"data.path={letters(make_data(root / 'data', vocab_size=257))}"
    common, watched = (data, "optim.schedule.kind=constant", *COMMON), (*WATCHED, *scored(root))
    in_turn([(root / "plain", (*common, "max_steps=4"))])
    write_tasks(root, root / "plain")
    given = [("watched", 4), ("resumed", 3), ("resumed", 4)]
    in_turn([(root / run, (*common, *watched, f"max_steps={steps}")) for run, steps in given])
    return root


def test_evaluations_leave_the_training_bit_equal(runs: Path) -> None:
    assert story(runs / "watched") == story(runs / "plain")
    assert weights(runs / "watched") == weights(runs / "plain") != {}


def test_evaluations_are_equal_after_a_resume(runs: Path) -> None:
    assert _found(runs / "resumed", 4) == _found(runs / "watched", 4) != {}
    assert weights(runs / "resumed") == weights(runs / "watched")


def test_the_loss_of_training_windows_is_of_the_first_ones(runs: Path) -> None:
    """By plain torch, with the weights of the last checkpoint."""
    _, model = _last(runs / "watched")
    first = torch.as_tensor(shards_of(runs / "data" / "train")[0][: 5 * N_CTX + 1].astype("int64"))
    with torch.no_grad():
        logits = model.logits(first[:-1].view(5, N_CTX)).flatten(0, 1)
    truth = F.cross_entropy(logits, first[1:]).item()
    assert _found(runs / "watched", 4)["val/train_loss"] == pytest.approx(truth, rel=1e-6)


def test_samples_are_what_generate_makes_of_the_checkpoint(runs: Path) -> None:
    """At each validation; the same prompt twice is two samples."""
    drawn = _samples(runs / "watched")
    assert list(drawn) == [2, 4] and list(drawn[4]) == _truth(runs / "watched") and drawn[4][1] != drawn[4][2]
    assert (runs / "watched/samples/step-00000004.txt").read_text() == "\n---\n".join(drawn[4])
    assert _samples(runs / "resumed")[4] == drawn[4]


def test_scores_on_tasks_are_those_of_evaluate(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure, with n and standard errors, by the checkpoint of the step; asked where tasks_every says alone."""
    rows = read_journal(runs / "watched/metrics.jsonl")
    assert [row.step for row in rows if any(key.startswith("task/") for key in row.metrics)] == [3, 4]
    _compare_with_evaluate(runs / "watched", runs, tmp_path / "out", capsys)
    assert _found(runs / "watched", 4)["task/write/exact_text"] == 4 / 7  # of seven, every second from the first


@pytest.mark.parametrize("layout", ["tp2", pytest.param("zero3", marks=pytest.mark.long)])
def test_evaluations_of_layouts_leave_the_training_bit_equal(
    runs: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks that share a model, and two that share its weights alone and have half of the questions each."""
    how = (f"data.path={runs / 'data'}", *COMMON, "max_steps=4", f"parallel={layout}")
    in_turn([(tmp_path / "plain", how), (tmp_path / "watched", [*how, *WATCHED, *scored(runs)])], ranks=2)
    assert story(tmp_path / "watched") == story(tmp_path / "plain")
    assert weights(tmp_path / "watched") == weights(tmp_path / "plain") != {}
    assert list(_samples(tmp_path / "watched")[4]) == _truth(tmp_path / "watched")
    _compare_with_evaluate(tmp_path / "watched", runs, tmp_path / "out", capsys)


def test_samples_that_cannot_be_are_refused(runs: Path) -> None:
    tokenizer = Tokenizer.load(runs / "data" / "train")
    model = ModelConfig("test", n_layer=1, n_head=1, n_embd=8, n_ctx=N_CTX, vocab_size=257)
    for prompt, room in (("", N_CTX - 1), ("abc", N_CTX - 3)):
        Samples(SamplesConfig([prompt], tokens=room), tokenizer, model)
        with pytest.raises(UserError, match=rf"tokens={room + 1} after .* give eval.samples.tokens={room},"):
            Samples(SamplesConfig(["", prompt], tokens=room + 1), tokenizer, model)
    with pytest.raises(UserError, match=r"model.n_ctx=64: give a shorter prompt"):
        Samples(SamplesConfig(["a" * N_CTX], tokens=1), tokenizer, model)
    with pytest.raises(UserError, match=r"eval.samples.tokens=0: give at least 1"):
        SamplesConfig(["a"], tokens=0)


def test_training_windows_that_are_not_there_are_refused(runs: Path) -> None:
    """Or that no validation stands beside."""
    root, model = runs / "data", ModelConfig("test", n_layer=1, n_head=1, n_embd=8, n_ctx=N_CTX, vocab_size=257)
    train, val = (open_source(str(root / split), None) for split in ("train", "val"))
    windows = sum(shard.windows(N_CTX) for shard in train.shards)
    check_sources(Sources({"a": train}, {"a": val}, None), model, EvalConfig(0, train_windows=windows))
    with pytest.raises(UserError, match=rf"eval.train_windows={windows + 1}, but .* give 0 to {windows}"):
        check_sources(Sources({"a": train}, {"a": val}, None), model, EvalConfig(0, train_windows=windows + 1))
    with pytest.raises(UserError, match=r"no source has validation data: .* or give eval.train_windows=0"):
        check_sources(Sources({"a": train}, {}, None), model, EvalConfig(0, train_windows=1))


def _found(run: Path, step: int) -> dict[str, float]:
    """The numbers of a validation, and of the tasks."""
    [row] = [row for row in read_journal(run / "metrics.jsonl") if row.step == step]
    return {key: value for key, value in row.metrics.items() if key.startswith(("val/", "task/"))}


def _compare_with_evaluate(run: Path, tasks: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The journal's figures of step 4 with those of the last checkpoint, by one rank and in other batches."""
    files = {name: str(tasks / f"{name}.yaml") for name in KINDS}
    capsys.readouterr()
    evaluate(EvaluateConfig(str(run), list(files.values()), str(tasks), limit=7, json=True, output=str(output)))
    results = json.loads(capsys.readouterr().out)["results"]
    found = {key: value for key, value in _found(run, 4).items() if key.startswith("task/")}
    truth = {f"task/{name}/{key}": x for name, file in files.items() for key, x in results[file].items()}
    assert found == {key: pytest.approx(x, rel=1e-6) for key, x in truth.items() if not isinstance(x, str)}
    assert {f"task/{name}/n" for name in KINDS} < found.keys() and math.isfinite(found["task/complete/ppl_stderr"])


def _samples(run: Path) -> dict[int, tuple[str, ...]]:
    """The texts of each validation, by step."""
    return {row.step: row.samples for row in read_journal(run / "metrics.jsonl") if row.samples}


def _truth(run: Path) -> list[str]:
    """What one process draws from the run's last checkpoint."""
    tokenizer, model = _last(run)
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    new = sample(model, [each or [256] for each in ids], Sampling(), max_new_tokens=9, seed=0, eot=256)
    return [tokenizer.decode(prompt + more) for prompt, more in zip(ids, new, strict=True)]


def _last(run: Path) -> tuple[Tokenizer, GPT]:
    """The vocabulary and the model of the run's last checkpoint."""
    latest = RunFolder(run).latest()
    assert latest is not None
    return Tokenizer.load(latest / TOKENIZER), load_model(latest, model_of(latest, RunFolder.state(latest)))

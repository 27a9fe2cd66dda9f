"""What a run finds out at its validations changes nothing of its training, and is the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from conf.errors import UserError
from data_pipeline.manifest import TOKENIZER
from data_pipeline.remote.source import open_source
from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.stream_truth import shards_of
from tests.system.mixtures import in_turn
from tests.system.runs import letters, make_data
from tests.system.test_resume import story, weights
from trainer.checkpoint.find import model_of
from trainer.config.model import ModelConfig
from trainer.config.pretrain import EvalConfig, SamplesConfig
from trainer.data.sources import Sources, check_sources
from trainer.generate import load_model
from trainer.inference.requests import Sampling
from trainer.inference.sampler import sample
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal
from trainer.samples import Samples

COMMON = ("model.vocab_size=257", "eval.every=2", "tokens_per_step=256", "model.dropout=0.1")
PROMPTS = ["", "ab", "ab", "a text"]
WATCHED = ("eval.train_windows=5", f"eval.samples.prompts={json.dumps(PROMPTS)}", "eval.samples.tokens=9")
N_CTX = 64


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluations beside its validation, one with them, and one with them in two starts."""
    root = tmp_path_factory.mktemp("evaluations")
    data = f"data.path={letters(make_data(root / 'data', vocab_size=257))}"
    given = [
        ("plain", "max_steps=4"),
        ("watched", "max_steps=4", *WATCHED),
        ("resumed", "max_steps=3", *WATCHED),
        ("resumed", "max_steps=4", *WATCHED),
    ]
    in_turn([(root / run, [data, "optim.schedule.kind=constant", *COMMON, *how]) for run, *how in given])
    return root


def test_evaluations_leave_the_training_bit_equal(runs: Path) -> None:
    assert story(runs / "watched") == story(runs / "plain")
    assert weights(runs / "watched") == weights(runs / "plain") != {}


def test_evaluations_are_equal_after_a_resume(runs: Path) -> None:
    assert _found(runs / "resumed", 4) == _found(runs / "watched", 4) != {}
    assert weights(runs / "resumed") == weights(runs / "watched")


def test_the_loss_of_training_windows_is_of_the_first_ones(runs: Path) -> None:
    """By plain torch, with the weights of the last checkpoint."""
    latest = RunFolder(runs / "watched").latest()
    assert latest is not None
    model = load_model(latest, model_of(latest, RunFolder.state(latest)))
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


@pytest.mark.parametrize("layout", ["tp2", pytest.param("zero3", marks=pytest.mark.long)])
def test_samples_of_layouts_leave_the_training_bit_equal(runs: Path, tmp_path: Path, layout: str) -> None:
    """Two ranks that share a model, and two that share its weights alone and have half of the prompts each."""
    how = (f"data.path={runs / 'data'}", *COMMON, "max_steps=4", f"parallel={layout}")
    in_turn([(tmp_path / "plain", how), (tmp_path / "watched", [*how, *WATCHED])], ranks=2)
    assert story(tmp_path / "watched") == story(tmp_path / "plain")
    assert weights(tmp_path / "watched") == weights(tmp_path / "plain") != {}
    assert list(_samples(tmp_path / "watched")[4]) == _truth(tmp_path / "watched")


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
    """The numbers of a validation."""
    [row] = [row for row in read_journal(run / "metrics.jsonl") if row.step == step]
    return {key: value for key, value in row.metrics.items() if key.startswith("val/")}


def _samples(run: Path) -> dict[int, tuple[str, ...]]:
    """The texts of each validation, by step."""
    return {row.step: row.samples for row in read_journal(run / "metrics.jsonl") if row.samples}


def _truth(run: Path) -> list[str]:
    """What one process draws from the run's last checkpoint."""
    latest = RunFolder(run).latest()
    assert latest is not None
    tokenizer, model = Tokenizer.load(latest / TOKENIZER), load_model(latest, model_of(latest, RunFolder.state(latest)))
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    new = sample(model, [each or [256] for each in ids], Sampling(), max_new_tokens=9, seed=0, eot=256)
    return [tokenizer.decode(prompt + more) for prompt, more in zip(ids, new, strict=True)]

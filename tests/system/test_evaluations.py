"""What a run finds out at its validations changes nothing of its training, and is the same after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from conf.errors import UserError
from data_pipeline.remote.source import open_source
from tests.helpers.stream_truth import shards_of
from tests.system.mixtures import in_turn
from tests.system.runs import make_data
from tests.system.test_resume import story, weights
from trainer.checkpoint.find import model_of
from trainer.config.model import ModelConfig
from trainer.config.pretrain import EvalConfig
from trainer.data.sources import Sources, check_sources
from trainer.generate import load_model
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal

COMMON = ("eval.every=2", "tokens_per_step=256", "model.dropout=0.1", "optim.schedule.kind=constant")
WATCHED = ("eval.train_windows=5",)
N_CTX = 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluations beside its validation, one with them, and one with them in two starts."""
    root = tmp_path_factory.mktemp("evaluations")
    data = f"data.path={make_data(root / 'data')}"
    given = [
        ("plain", "max_steps=4"),
        ("watched", "max_steps=4", *WATCHED),
        ("resumed", "max_steps=3", *WATCHED),
        ("resumed", "max_steps=4", *WATCHED),
    ]
    in_turn([(root / run, [data, *COMMON, *how]) for run, *how in given])
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


def test_training_windows_that_are_not_there_are_refused(runs: Path) -> None:
    """Or that no validation stands beside."""
    root, model = runs / "data", ModelConfig("test", n_layer=1, n_head=1, n_embd=8, n_ctx=N_CTX, vocab_size=1024)
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

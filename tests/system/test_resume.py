"""A run that is killed and started again is the run that was never killed, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.system.runs import kill_at, make_data, pretrain, start
from trainer.journal import read_journal
from trainer.run_folder import RunFolder

EXACT = ("train/loss", "val/loss", "optim/lr", "optim/grad_norm", "data/position", "data/crc32")


def story(run: Path) -> list[tuple[int, dict[str, float]]]:
    """What must be equal, of every step; crc32 is of the tokens themselves."""
    return [
        (row.step, {k: v for k, v in row.metrics.items() if k in EXACT}) for row in read_journal(run / "metrics.jsonl")
    ]


def weights(run: Path) -> dict[str, bytes]:
    latest = RunFolder(run).latest()
    assert latest is not None
    return {f.name: f.read_bytes() for f in sorted(latest.glob("*.safetensors"))}


def check_kills(tmp_path: Path, kills: list[tuple[int, int]], steps: int, *overrides: str) -> None:
    """Train to `steps` in one go, and again with SIGKILL to a rank at each of `kills` (step, rank)."""
    data = make_data(tmp_path / "data")
    common = (f"data.path={data}", f"max_steps={steps}", "model.dropout=0.1", "eval.every=5", *overrides)
    pretrain(tmp_path / "whole", *common, ranks=2)
    killed = tmp_path / "killed"
    for step, rank in kills:
        last = kill_at(start(killed, *common, ranks=2), killed / "metrics.jsonl", step, rank)
        assert last < steps, "the run ended before the kill: nothing was tested"
    pretrain(killed, *common, ranks=2)
    starts = len(list((killed / "generations").iterdir()))
    assert starts == len(kills) + 1
    assert len(story(killed)) == steps
    assert story(killed) == story(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")


def test_resume_is_exact_after_kill(tmp_path: Path) -> None:
    check_kills(tmp_path, [(6, 1)], 12)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 3])
def test_resume_is_exact_after_five_kills_at_random_steps(tmp_path: Path, precision: str, zero: int) -> None:
    rng = random.Random(f"{precision} {zero}")
    steps = sorted(rng.sample(range(5, 60), 5))
    kills = [(step, rng.randrange(2)) for step in steps]
    check_kills(
        tmp_path, kills, 64, f"precision={precision}", f"parallel.zero_stage={zero}", "checkpoint.every_steps=3"
    )

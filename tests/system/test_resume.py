"""A run that is killed and started again is the run that was never killed, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.system.runs import finish, kill_at, letters, make_data, pretrain, start, told
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal

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
    data = tmp_path / "data"
    if not data.exists():
        make_data(data)
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
def test_resume_is_exact_where_windows_are_rearranged(tmp_path: Path) -> None:
    """And refused with another fim_rate."""
    data = letters(make_data(tmp_path / "data", vocab_size=257))
    check_kills(tmp_path, [(6, 1)], 12, "model.vocab_size=257", "data.fim_rate=0.5")
    plain = (f"data.path={data}", "model.vocab_size=257", "max_steps=12", "model.dropout=0.1", "eval.every=5")
    [(code, err)] = finish(start(tmp_path / "whole", *plain))
    assert code == 2 and "data.fim_rate is 0.0" in err and "was trained with 0.5" in err
    pretrain(tmp_path / "plain", *plain)
    theirs, ours = story(tmp_path / "plain"), story(tmp_path / "whole")
    assert all(a["data/position"] == b["data/position"] for (_, a), (_, b) in zip(theirs, ours, strict=True))
    assert all(a["data/crc32"] != b["data/crc32"] for (_, a), (_, b) in zip(theirs, ours, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("precision", "zero", "kills"),
    [
        pytest.param("fp32", 1, 5, marks=pytest.mark.long),
        pytest.param("bf16", 1, 5, marks=pytest.mark.long),
        ("bf16", 3, 2),
    ],
)
def test_resume_is_exact_after_kills_at_random_steps(tmp_path: Path, precision: str, zero: int, kills: int) -> None:
    rng = random.Random(f"{precision} {zero}")
    at = [(step, rng.randrange(2)) for step in sorted(rng.sample(range(4, 34), kills))]
    check_kills(tmp_path, at, 36, f"precision={precision}", f"parallel.zero_stage={zero}", "checkpoint.every_steps=3")


def test_resume_is_obeyed_and_a_finished_run_unchanged(tmp_path: Path) -> None:
    """resume=must and never are held."""
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=3", "checkpoint.every_minutes=1e-9")
    [(code, err)] = finish(start(tmp_path / "run", *common, "resume=must"))
    assert code == 2 and "holds no checkpoint" in err
    pretrain(tmp_path / "run", *common)
    steps = [p.name for p in RunFolder(tmp_path / "run").published()]
    assert steps == ["step-00000002.gen-0001", "step-00000003.gen-0001"], (
        "by the clock each step, of which two are kept"
    )
    rows = {row.step: row.metrics for row in read_journal(tmp_path / "run" / "metrics.jsonl")}
    for step in (2, 3):
        assert rows[step]["checkpoint/stall_s"] > 0 and rows[step]["checkpoint/write_s"] > 0
    [(code, err)] = finish(start(tmp_path / "run", *common, "resume=never"))
    assert code == 2 and "holds step-00000003.gen-0001" in err
    before = story(tmp_path / "run")
    pretrain(tmp_path / "run", *common, "resume=must")
    assert story(tmp_path / "run") == before


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    """A rate that ruins the model late: the lowest validation loss is not the last."""
    data = make_data(tmp_path / "data")
    good = (f"data.path={data}", "eval.every=2", "checkpoint.keep=1", "checkpoint.every_steps=2")
    pretrain(tmp_path / "run", *good, "max_steps=8")
    pretrain(tmp_path / "run", *good, "max_steps=14", "optim.lr=3.0", "optim.schedule.kind=constant")
    val = {step: m["val/loss"] for step, m in story(tmp_path / "run") if "val/loss" in m}
    best = min(val, key=lambda step: val[step])
    assert best < 14
    kept = [int(p.name[5:13]) for p in RunFolder(tmp_path / "run").published()]
    assert kept == [best, 14]


@pytest.mark.slow
def test_the_best_is_best_of_what_was_measured_alike(tmp_path: Path) -> None:
    """A stage of another n_ctx, then other eval.windows at a rate that ruins the model: the old losses are lower."""
    run = tmp_path / "run"
    common = (f"data.path={make_data(tmp_path / 'data')}", "eval.every=2", "checkpoint.keep=1")
    common = (*common, "data.stages=[{step: 2, n_ctx: 32}]")
    first = told(run, *common, "max_steps=4")
    second = told(run, *common, "max_steps=8", "eval.windows=4", "optim.lr=3.0", "optim.schedule.kind=constant")
    lines = [line for line in (*first, *second) if "the ranking of checkpoints starts anew" in line]
    assert len(lines) == 2
    assert "8 windows of 64 tokens" in lines[0] and "8 windows of 32 tokens" in lines[0]
    assert "8 windows of 32 tokens" in lines[1] and "4 windows of 32 tokens" in lines[1]
    val = {step: m["val/loss"] for step, m in story(run) if "val/loss" in m}
    assert max(val[2], val[4]) < min(val[6], val[8])
    best = min((6, 8), key=lambda step: val[step])
    latest = RunFolder(run).latest()
    assert latest is not None and RunFolder.state(latest)["best_val_loss"] == val[best]
    assert [int(p.name[5:13]) for p in RunFolder(run).published()] == sorted({best, 8})


@pytest.mark.slow
def test_another_layout_resumes_within_rounding(tmp_path: Path) -> None:
    """With the same windows."""
    common = (f"data.path={make_data(tmp_path / 'data')}", "eval.every=4", "optim.schedule.kind=constant")
    pretrain(tmp_path / "whole", *common, "max_steps=16")
    run = tmp_path / "run"
    pretrain(run, *common, "max_steps=4", ranks=2)
    pretrain(run, *common, "max_steps=8", "parallel=tp2", ranks=2)
    pretrain(run, *common, "max_steps=12", "parallel=zero3", "micro_batch_size=1", ranks=2)
    pretrain(run, *common, "max_steps=16", "parallel.recompute=full")
    for (step, ours), (_, whole) in zip(story(run), story(tmp_path / "whole"), strict=True):
        assert ours.keys() == whole.keys()
        assert ours["data/position"] == whole["data/position"]
        for key in ours.keys() & {"train/loss", "val/loss", "optim/grad_norm"}:
            assert ours[key] == pytest.approx(whole[key], rel=2e-5), (step, key)


@pytest.mark.slow
def test_another_batch_size_resumes_at_the_same_position(tmp_path: Path) -> None:
    """No window is repeated or left out."""
    common = (f"data.path={make_data(tmp_path / 'data')}",)
    pretrain(tmp_path / "run", *common, "max_steps=3")
    pretrain(tmp_path / "run", *common, "max_steps=5", "tokens_per_step=1024")
    assert [m["data/position"] for _, m in story(tmp_path / "run")] == [0, 8, 16, 24, 40]
    latest = RunFolder(tmp_path / "run").latest()
    assert latest is not None
    ledger = RunFolder.state(latest)["data"]["ledger"]
    assert [(s["step"], s["position"], s["windows_per_step"]) for s in ledger] == [(0, 0, 8), (3, 24, 16)]

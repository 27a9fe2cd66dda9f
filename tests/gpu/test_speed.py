"""What makes a step fast, on one NVIDIA GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from tests.benchmarks import train_speed
from tests.system.runs import make_data, pretrain
from tests.system.test_resume import story

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU here: the CPU tests hold the same promises"
    ),
]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("zero", [1, 2])
def test_a_compiled_run_follows_an_eager_one(tmp_path: Path, zero: int, recompute: str) -> None:
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=10", f"parallel.zero_stage={zero}")
    for mode in ("on", "off"):
        pretrain(tmp_path / mode, *common, f"compile={mode}", f"parallel.recompute={recompute}", device="cuda")
    on, off = (dict(story(tmp_path / mode)) for mode in ("on", "off"))
    for step, metrics in off.items():
        assert on[step]["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-4)


def test_a_compiled_run_with_dropout_gives_the_same_bits_twice(tmp_path: Path) -> None:
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=6", "model.dropout=0.1", "deterministic=true")
    for run in ("a", "b"):
        pretrain(tmp_path / run, *common, "compile=on", device="cuda")
    assert story(tmp_path / "a") == story(tmp_path / "b")


def test_a_step_waits_once_for_the_device(mesh: object) -> None:
    given = train_speed.settings(["sizes=test"])
    side = train_speed.ours(train_speed.config_of("test", 2, given, fp8=False), mesh)
    for seed in range(3):
        side.step(seed)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            side.step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) + f" ({w.filename}:{w.lineno})" for w in said if "synchroniz" in str(w.message)]
    assert len(waits) <= 1, waits


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="a GPU without fp8 products"
)
def test_fp8_stays_within_one_percent_of_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    train_speed.main(["sizes=124M", "micro_batch=8", "equal_steps=50", "--fp8-equality", "json=true"])
    found = json.loads(capsys.readouterr().out)["sizes"]["124M"]
    assert found["last"]["bf16"] < 0.9 * found["first"]["bf16"] and found["last_apart"] < 0.01


def test_compiled_xl_block_makes_its_first_step_in_half_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    train_speed.main(["sizes=1558M", "sides=ours", "steps=3", "rounds=1", "micro_batch=1", "json=true"])
    found = json.loads(capsys.readouterr().out)["sizes"]["1558M"]["sides"]["ours"]
    assert found["compiled"] and found["compile_s"] < 30

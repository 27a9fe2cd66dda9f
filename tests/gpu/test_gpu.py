"""The same promises on one NVIDIA GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.system.runs import kill_at, make_data, pretrain, start
from tests.system.test_resume import story, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU here: the CPU tests hold the same promises"
    ),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_resume_on_a_gpu_is_exact_when_deterministic(tmp_path: Path, precision: str, zero: int) -> None:
    data = make_data(tmp_path / "data")
    common = (f"data.path={data}", "max_steps=12", "model.dropout=0.1", "deterministic=true", f"precision={precision}")
    common = (*common, f"parallel.zero_stage={zero}")
    pretrain(tmp_path / "whole", *common, device="cuda")
    killed = tmp_path / "killed"
    assert kill_at(start(killed, *common, device="cuda"), killed / "metrics.jsonl", 6, rank=0) < 12
    pretrain(killed, *common, device="cuda")
    assert story(killed) == story(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_gpu_follows_the_cpu(tmp_path: Path, zero: int) -> None:
    """fp32 on both; the GPU sums in another order, so the curves part by rounding only."""
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=10", f"parallel.zero_stage={zero}")
    for device in ("cpu", "cuda"):
        pretrain(tmp_path / device, *common, device=device)
    cpu, gpu = (dict(story(tmp_path / device)) for device in ("cpu", "cuda"))
    for step, metrics in cpu.items():
        assert gpu[step]["data/crc32"] == metrics["data/crc32"]
        assert gpu[step]["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-4)

"""Background saves from one NVIDIA GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.system.runs import make_data, pretrain
from tests.system.test_resume import weights
from trainer.checkpoint.snapshot import Snapshot
from trainer.engine.fragments import Fragment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU here: the CPU tests hold the same promises"
    ),
]


def test_a_snapshot_is_pinned_and_later_updates_do_not_change_it() -> None:
    device = torch.device("cuda")
    flat = torch.randn(3, 5_000_001, device=device)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    fragments = [
        Fragment(f"p{at}", at, n, {k: flat[i].narrow(0, at, n) for i, k in enumerate(kinds)})
        for at, n in ((0, 1), (1, 3_000_000), (3_000_001, 2_000_000))
    ]
    snapshot = Snapshot(fragments, device)
    assert snapshot._buffer.is_pinned() and snapshot.nbytes == flat.nbytes
    for _ in range(2):  # the second into pages that are used again
        for _ in range(50):  # kernels that are still under way when the copy is asked for
            flat.mul_(1.0001)
        copies = snapshot.take(fragments)
        want = flat.cpu()
        flat.normal_()
        for copy in copies:
            for i, kind in enumerate(kinds):
                assert torch.equal(copy.views[kind], want[i].narrow(0, copy.start, copy.length))


@pytest.mark.parametrize("zero", [1, 3])
def test_a_background_save_has_the_bytes_of_a_blocking_one(tmp_path: Path, zero: int) -> None:
    common = (f"data.path={make_data(tmp_path / 'data')}", "max_steps=6", "deterministic=true", "precision=bf16")
    common = (*common, f"parallel.zero_stage={zero}", "checkpoint.every_steps=1")
    for way in ("true", "false"):
        pretrain(tmp_path / way, *common, f"checkpoint.background={way}", device="cuda")
    assert weights(tmp_path / "true") == weights(tmp_path / "false")

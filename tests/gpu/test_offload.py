"""GPT-2 XL trains on a GPU of 24 GiB with offload and recompute: the allocator refuses a byte more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.files import GIB
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: nothing to cap"),
]


def xl(gib: int, zero: int) -> dict[str, Any]:
    """Three steps of two micro batches, and what was left on the GPU between them."""
    from data_pipeline.stream.loader import Batch
    from tests.distributed import tiny_run as run
    from trainer.config.parallel import Recompute
    from trainer.distributed.mesh import join_ranks
    from trainer.distributed.world import read_world
    from trainer.engine.fragments import owned
    from trainer.objective.language_model import LanguageModel
    from trainer.setup import build_engine

    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    shape = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "n_ctx": 1024, "vocab_size": 50257, "init_std": 0.02}
    cfg = run.config(zero=zero, precision="bf16", offload="cpu", recompute=Recompute.full.value, model=shape)
    mesh = join_ranks(read_world(), cfg.parallel)
    engine = build_engine(cfg, LanguageModel(), mesh, None)
    g, losses = torch.Generator().manual_seed(0), []
    tokens = torch.randint(1000, (2, 1025), generator=g)
    for _ in range(3):
        valid = run.counts(2048).to(mesh.device)
        parts = [engine.backward(Batch(t[:, :-1], t[:, 1:]), valid, last=i == 1) for i, t in enumerate(tokens[:, None])]
        engine.step(1e-4)
        losses.append(float(torch.stack(parts).sum()) / 2048)
    where = {str(x.device) for f in owned(engine.module, engine.adam) for x in f.views.values()}
    return {"losses": losses, "where": sorted(where), "peak_gib": torch.cuda.max_memory_reserved() / GIB}


@pytest.mark.parametrize("zero", [2, 3])  # ZeRO-1 keeps whole gradients on the GPU, in bf16 and in fp32
def test_gpt2_xl_trains_on_24_gib(zero: int) -> None:
    [got] = run_ranks(1, "tests.gpu.test_offload:xl", timeout_s=800, device="cuda", gib=24, zero=zero)
    assert got["where"] == ["cpu"] and got["peak_gib"] <= 24
    assert got["losses"][-1] < got["losses"][0] - 0.1, got


def same_resume(folder: str) -> dict[str, Any]:
    from pathlib import Path

    from tests.distributed import tiny_run as run
    from tests.distributed.trainer.checkpoint.test_checkpoint import AT, going_on, save
    from trainer.checkpoint import load as checkpoint
    from trainer.distributed.mesh import join_ranks
    from trainer.distributed.world import read_world
    from trainer.engine.engine import make_deterministic
    from trainer.objective.language_model import LanguageModel
    from trainer.setup import build_engine

    make_deterministic()
    mesh = join_ranks(read_world(), run.config().parallel)
    out = {}
    for zero in (1, 2, 3):
        cfg = run.config(zero=zero, precision="bf16", offload="cpu")
        engine = build_engine(cfg, LanguageModel(), mesh, None)
        run.curve(engine, range(AT))
        path = Path(save(engine, Path(folder) / str(zero)))
        went = going_on_digest(going_on(engine))
        again = build_engine(cfg, LanguageModel(), mesh, path)
        assert checkpoint.read_state(path)["optimizer_step"] == AT
        out[f"zero{zero}"] = [went, going_on_digest(going_on(again))]
    return out


def going_on_digest(story: dict[str, Any]) -> str:
    return repr(story["curve"])


def test_resume_with_offload_on_a_gpu_is_exact(tmp_path: Any) -> None:
    [got] = run_ranks(1, "tests.gpu.test_offload:same_resume", device="cuda", folder=str(tmp_path))
    for zero, (went, resumed) in got.items():
        assert went == resumed, zero

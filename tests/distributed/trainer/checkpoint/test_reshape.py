"""Any (dp, tp, ZeRO stage) takes up a checkpoint of any other: every layout of four ranks, through one canonical one.

The canonical checkpoint is of one process; each layout goes on from it, saves, and one process goes on from that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tiny_run as run
from tests.helpers.ranks import run_ranks
from trainer.checkpoint.files import SavedWeights

HERE = "tests.distributed.trainer.checkpoint.test_reshape"
AT, THERE, BACK = 3, 2, 2  # steps before the canonical checkpoint, on another layout, and back on one process
MODEL = {"n_head": 5, "n_embd": 30, "vocab_size": 3511}  # neither heads nor width nor vocabulary divide by 4
GRID = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}  # ranks: (dp, tp)
LAYOUTS = [f"dp{dp} tp{tp} zero{zero}" for grid in GRID.values() for dp, tp in grid for zero in (1, 2, 3)]


def canonical(folder: str) -> dict[str, Any]:
    """The run that nobody interrupts, and its checkpoint after AT steps."""
    with run.layout() as mesh:
        engine = run.build(run.config(model=MODEL), mesh)
        run.curve(engine, range(AT))
        path = save(engine, Path(folder) / "canonical")
        return {"path": path, "saved": run.digest(engine), "curve": run.curve(engine, range(AT, AT + THERE + BACK))}


def save(engine: Any, folder: Path) -> str:
    saver = run.saver(engine, folder)
    saver.save(AT, {})
    saver.wait()
    return str(saver.writer.run.checkpoint(AT, 1))


def go_on(ranks: int, path: str, folder: str) -> dict[str, Any]:
    """On each layout of so many ranks: saved as it was loaded, trained, saved again."""
    out = {}
    for dp, tp in GRID[ranks]:
        for zero in (1, 2, 3):
            name = f"dp{dp} tp{tp} zero{zero}"
            with run.layout(tp=tp) as mesh:
                split = tp > 1 and zero != 2  # sequence parallelism with and without
                cfg = run.config(tp=tp, sequence_parallel=split, zero=zero, model=MODEL)
                engine = run.build(cfg, mesh, seed=1, load=Path(path))
                out[name] = {
                    "untouched": save(engine, Path(folder) / f"{name} untouched"),
                    "curve": run.curve(engine, range(AT, AT + THERE)),
                    "trained": save(engine, Path(folder) / name),
                }
    return out


def come_back(found: dict[str, Any]) -> dict[str, Any]:
    out = {}
    with run.layout() as mesh:
        for name, paths in found.items():
            engine = run.build(run.config(model=MODEL), mesh, seed=1, load=Path(paths["untouched"]))
            saved = run.digest(engine)
            engine = run.build(run.config(model=MODEL), mesh, seed=1, load=Path(paths["trained"]))
            out[name] = {"saved": saved, "curve": run.curve(engine, range(AT + THERE, AT + THERE + BACK))}
    return out


def off(ours: list[list[float]], whole: list[list[float]]) -> float:
    """The largest difference of a loss or a gradient norm, over the largest of its kind."""
    x, y = torch.tensor(ours, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64)
    return float(((x - y).abs().amax(0) / y.abs().amax(0)).max())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_layout_goes_on_from_one_checkpoint_and_leads_back(tmp_path: Path) -> None:
    [whole] = run_ranks(1, f"{HERE}:canonical", folder=str(tmp_path))
    found = {}
    for ranks in GRID:
        given = {"ranks": ranks, "path": whole["path"], "folder": str(tmp_path)}
        found |= run_ranks(ranks, f"{HERE}:go_on", **given, timeout_s=400)[0]
    assert list(found) == LAYOUTS
    [back] = run_ranks(1, f"{HERE}:come_back", found=found)
    first = SavedWeights(Path(whole["path"]))
    for name in LAYOUTS:
        again = SavedWeights(Path(found[name]["untouched"]))
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            for parameter in first:
                assert torch.equal(again.full(kind, parameter), first.full(kind, parameter)), (name, kind, parameter)
        assert back[name]["saved"] == whole["saved"], f"{name}: the way there and back changed bits"
        assert off(found[name]["curve"], whole["curve"][:THERE]) <= 1e-5, name
        assert off(back[name]["curve"], whole["curve"][THERE:]) <= 1e-5, name

"""Going back inside of one process, in every wrapper: the old engine's memory goes before the new one takes its own."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import free_port, run_ranks
from tests.system.plants import MARKER, make_plants
from tests.system.runs import TINY

HOW = ("guard.skips=1", "guard.within=1", "max_steps=7", "checkpoint.every_steps=3", "optim.schedule.kind=constant")
BAD = 5  # the run goes back from here to step 3
CASES = {
    "fp32 zero3": ("precision=fp32", "parallel=zero3"),
    "bf16 zero1": ("precision=bf16",),
    "bf16 zero2": ("precision=bf16", "parallel=zero2"),
    "muon": ("precision=bf16", "optim.kind=muon", "optim.muon_lr=0.02", "optim.momentum=0.95"),
    "tp2": ("precision=fp32", "parallel=tp2"),
}


def on_two_ranks(root: str, ports: list[int]) -> dict[str, Any]:
    return {name: gone_back(root, f"{root}/{name}", how, ports.pop()) for name, how in CASES.items()}


def gone_back(root: str, run: str, how: tuple[str, ...], port: int) -> dict[str, Any]:
    """A whole run in this process, and how many numbers of its first engine were alive once that was given back."""

    from trainer import engine, rollback

    os.environ["MASTER_PORT"] = str(port)
    backward, free, old = engine.Engine.backward, rollback._free_engine, list[Any]()

    def backward_or_nan(self: Any, batch: Any, valid: Any, last: bool) -> Any:
        return backward(self, batch, float("nan") if bool((batch.tokens == MARKER).any()) else valid, last)

    def freed(t: Any) -> None:
        adam, parameters = t.engine.adam, [weakref.ref(p) for p in t.engine.module.parameters()]
        flats = [weakref.ref(p) for group in adam.param_groups for p in group["params"]]
        flats += [weakref.ref(x) for state in adam.state.values() for x in state.values()]
        assert len(flats) >= 3 and len(parameters) > 10
        del adam
        free(t)
        old.append(sum(x.numel() for ref in [*parameters, *flats] if (x := ref()) is not None))

    engine.Engine.backward, rollback._free_engine = backward_or_nan, freed  # type: ignore[method-assign]
    try:
        with trainer_of(root, run, how) as t:
            t.train()
            found = {"ledger": t.plan.ledger.to_json(), "alive": old[-1], "skipped": t.guard.skipped}
    finally:
        engine.Engine.backward, rollback._free_engine = backward, free  # type: ignore[method-assign]
    return found


def trainer_of(root: str, run: str, how: tuple[str, ...]) -> Any:
    from conf.schema import load
    from trainer.layouts import check_layout
    from trainer.loop import Trainer
    from trainer.sources import open_sources
    from trainer.world import read_world

    wide = ("model.dropout=0.1", "model.n_embd=128")  # so that ZeRO-3 partitions the embedding truly
    cfg, world = load("pretrain", [*TINY, f"data.path={root}/data", f"run.dir={run}", *HOW, *wide, *how]), read_world()
    return Trainer(cfg, "", world, check_layout(cfg, world.world_size), open_sources(cfg.data))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rollback_gives_the_old_engine_back_and_goes_on_over_the_bad_windows(tmp_path: Path) -> None:
    data = make_plants(tmp_path / "data", {BAD: "marker"}, 1, *HOW)
    assert data.is_dir()
    ranks = run_ranks(
        2, "tests.distributed.test_rollback:on_two_ranks", root=str(tmp_path), ports=[free_port() for _ in CASES]
    )
    for found in ranks:
        for case, got in found.items():
            assert got["alive"] == 0, f"{case}: {got['alive']} numbers of the old engine are still there"
            assert [(s["step"], s["position"]) for s in got["ledger"]] == [(0, 0), (3, 24), (3, 48)], case
            assert got["skipped"] == 1, case

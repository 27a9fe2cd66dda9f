"""Going back inside of one process, in every wrapper: the old engine's memory goes before the new one takes its own.

Twice to one step; stopped by a signal on the way; and not at all where no data is left.
"""

from __future__ import annotations

import math
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import free_port, run_ranks
from tests.system.plants import MARKER, make_plants
from tests.system.runs import TINY
from tests.system.test_resume import weights
from trainer.config.pretrain import PretrainConfig

HOW = ("guard.skips=1", "guard.within=1", "max_steps=7", "checkpoint.every_steps=3", "optim.schedule.kind=constant")
BAD = (5, 8)  # the run goes back from step 5 to step 3, and there again: what step 8 would have had is step 5's now
TWICE = [(0, 0), (3, 24), (3, 48), (3, 72)]
CASES = {
    "fp32 zero3": ("precision=fp32", "parallel=zero3"),
    "bf16 zero1": ("precision=bf16",),
    "bf16 zero2": ("precision=bf16", "parallel=zero2"),
    "muon": ("precision=bf16", "optim.kind=muon", "optim.muon_lr=0.02", "optim.momentum=0.95"),
    "tp2": ("precision=fp32", "parallel=tp2"),
}


def on_two_ranks(root: str, ports: list[int]) -> dict[str, Any]:
    found = {name: gone_back(root, f"{root}/{name}", how, ports.pop()) for name, how in CASES.items()}
    return {"cases": found, "signal": signalled(root, f"{root}/signal", ports), "no data": no_data(root, ports.pop())}


def gone_back(root: str, run: str, how: tuple[str, ...], port: int, then: Any = None) -> dict[str, Any]:
    """A whole run in this process, and how many numbers of its old engines were alive when the new ones were built."""

    from trainer import setup
    from trainer.engine import engine

    os.environ["MASTER_PORT"] = str(port)
    backward, build, old, refs = engine.Engine.backward, setup.build_engine, list[Any](), list[Any]()

    def backward_or_nan(self: Any, batch: Any, counts: Any, last: bool) -> Any:
        return backward(self, batch, counts * (math.nan if bool((batch.tokens == MARKER).any()) else 1), last)

    def counted(*args: Any) -> Any:
        if refs:  # of the engine before
            old.append(sum(x.numel() for ref in refs if (x := ref()) is not None))
            if then:
                then(args[2])
        made = build(*args)
        refs[:] = [weakref.ref(p) for p in made.module.parameters()]
        assert len(refs) > 10
        refs.extend(weakref.ref(p) for group in made.adam.param_groups for p in group["params"])
        refs.extend(weakref.ref(x) for state in made.adam.state.values() for x in state.values())
        return made

    engine.Engine.backward, setup.build_engine = backward_or_nan, counted  # type: ignore[method-assign]
    try:
        with trainer_of(root, run, how) as t:
            t.train()
            ledger = t.parts.feed.state(t.step)["ledger"]
            return {"ledger": ledger, "alive": old, "skipped": t.guard.skipped, "step": t.step}
    finally:
        engine.Engine.backward, setup.build_engine = backward, build  # type: ignore[method-assign]


def signalled(root: str, run: str, ports: list[int]) -> dict[str, Any]:
    """SIGTERM to rank 1 in the middle of each of the two times: what it says, and the run that is started again."""
    from trainer.run import signals

    said = []

    def tell(mesh: Any) -> None:
        if mesh.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
        signals.OF_THIS_PROCESS = signals.Signals()
        signals.OF_THIS_PROCESS.install()
        try:
            gone_back(root, run, CASES["bf16 zero1"], ports.pop(), tell)
        except signals.Stopped as e:
            said.append(str(e))
    signals.OF_THIS_PROCESS = signals.Signals()
    return {"said": said, **gone_back(root, run, CASES["bf16 zero1"], ports.pop())}


def no_data(root: str, port: int) -> dict[str, Any]:
    """The run has data for its steps, but not for a jump too: what it says, and its folder before and after."""
    from conf.errors import UserError
    from trainer.data.shard_feed import ShardFeed
    from trainer.run.folder import RunFolder

    run, folders = RunFolder(f"{root}/no data"), list[Any]()
    jump = ShardFeed.jump

    def looked(self: Any, step: int, end: int) -> Any:
        folders.append(folder(run))
        return jump(self, step, end)

    ShardFeed.jump = looked  # type: ignore[method-assign]
    try:
        gone_back(
            root,
            str(run.root),
            ("guard.skips=2", "guard.within=8", "data.sources.shards.max_epochs=1", "max_steps=62"),
            port,
        )
        error = "none"
    except UserError as e:
        error = str(e)
    finally:
        ShardFeed.jump = jump  # type: ignore[method-assign]
    return {"error": error, "before": folders[0], "after": folder(run)}


def folder(run: Any) -> list[Any]:
    return [[p.name for p in run.published()], run.latest().name, run.newest_generation()]


def trainer_of(root: str, run: str, how: tuple[str, ...]) -> Any:
    from conf.schema import load
    from trainer.check import Checked
    from trainer.data.sources import open_sources
    from trainer.distributed.world import read_world
    from trainer.loop import Trainer
    from trainer.pretrain import language_model

    wide = ("model.dropout=0.1", "model.n_embd=128")  # so that ZeRO-3 partitions the embedding truly
    cfg, world = (
        load(PretrainConfig, [*TINY, f"data.path={root}/data", f"run.dir={run}", *HOW, *wide, *how]),
        read_world(),
    )
    return Trainer(cfg, "", world, language_model(Checked(cfg, open_sources(cfg.data), {}, "")))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rollback")
    make_plants(root / "data", dict.fromkeys(BAD, "marker"), 1, *HOW)
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    ports = [free_port() for _ in range(len(CASES) + 4)]
    return run_ranks(
        2, "tests.distributed.trainer.health.test_rollback:on_two_ranks", timeout_s=1500, root=str(root), ports=ports
    )


def places(found: dict[str, Any]) -> list[tuple[int, int]]:
    return [(s["step"], s["position"]) for s in found["ledger"]]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rollbacks_free_old_engines_and_jump_bad_windows(ranks: list[Any]) -> None:
    """Twice to one step, in every wrapper."""
    for found in ranks:
        for case, got in found["cases"].items():
            assert got["alive"] == [0, 0], f"{case}: {got['alive']} numbers of the old engines are still there"
            assert places(got) == TWICE, case
            assert (got["skipped"], got["step"]) == (2, 7), case


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_signal_during_a_rollback_stops_after_a_step(root: Path, ranks: list[Any]) -> None:
    """The run resumes as if it had never been stopped."""
    for found in ranks:
        got = found["signal"]
        assert len(got["said"]) == 2 and all("stopped by SIGTERM after step 4, saved " in said for said in got["said"])
        assert (places(got), got["alive"], got["skipped"]) == (TWICE, [], 2)
    assert weights(root / "signal") == weights(root / "bf16 zero1") != {}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_data_behind_a_jump_stops_before_any_change(ranks: list[Any]) -> None:
    """The run folder is as it was."""
    for found in ranks:
        got = found["no data"]
        assert "cannot go back: data.sources.shards.max_epochs=1: " in got["error"]
        steps = ["step-00000003.gen-0001", "step-00000006.gen-0001"]
        assert got["before"] == got["after"] == [steps, steps[-1], 1]

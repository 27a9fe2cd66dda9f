"""A shard lost in mid-run under data.on_bad_shard=skip: the refused step leaves nothing behind, in any layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny_run
from tests.helpers.ranks import free_port, run_ranks
from tests.system.mixtures import make_mixture, mixture, shard_first_needed_near
from tests.system.runs import TINY
from tests.system.test_resume import story
from trainer.config.pretrain import PretrainConfig

CASES = {
    "fp32 zero1": ("precision=fp32", "parallel=zero1"),
    "fp32 zero2": ("precision=fp32", "parallel=zero2"),
    "fp32 zero3": ("precision=fp32", "parallel=zero3"),
    "bf16 zero1": ("precision=bf16", "parallel=zero1"),
    "bf16 zero2": ("precision=bf16", "parallel=zero2"),
    "bf16 zero3": ("precision=bf16", "parallel=zero3"),
    "fp32 tp2": ("precision=fp32", "parallel=tp2"),
}
Found = dict[str, dict[str, Any]]  # run -> facts
FAST, SLOW = {"bf16 zero3", "fp32 tp2"}, {"fp32 zero1", "fp32 zero3"}
REST = set(CASES) - FAST - SLOW


def train(data: str, run: str, how: tuple[str, ...], lost: int | None, at: int, port: int) -> dict[str, Any]:
    """A whole run in this process; where `lost` is given, it plans from the start to do without that shard from step
    `at` on."""
    from conf.errors import UserError
    from conf.schema import load
    from trainer.check import Checked
    from trainer.data.sources import open_sources
    from trainer.distributed.world import read_world
    from trainer.engine.fragments import get_optimizer_step
    from trainer.loop import Trainer
    from trainer.pretrain import language_model

    os.environ["MASTER_PORT"] = str(port)  # a second meeting in the same place hangs
    common = (*mixture(Path(data), {"some": 1}), f"run.dir={run}", f"max_steps={at + 3}", "data.on_bad_shard=skip")
    wide = ("model.dropout=0.1", "model.n_embd=128")  # so that ZeRO-3 partitions the embedding truly
    cfg, world = load(PretrainConfig, [*TINY, *common, *wide, *how]), read_world()
    with Trainer(cfg, "", world, language_model(Checked(cfg, open_sources(cfg.data), {}, ""))) as trainer:
        if lost is not None:
            feed: Any = trainer.parts.feed
            feed.plan = feed._plan_of(feed.plan.ledger.lose(at, "some", lost))
            feed.retire(None)  # reads again, by the plan as it is now
        try:
            trainer.train()
        except UserError as e:
            return {"error": str(e)}
        return {
            "digest": tiny_run.digest(trainer.parts.engine),
            "updates": get_optimizer_step(trainer.parts.engine.adam),
            "ledger": trainer.parts.feed.state(trainer.step)["ledger"],
        }


def pairs(root: str, lost: int, at: int, ports: list[int], cases: list[str]) -> Found:
    return {
        f"{kind} {name}": train(f"{root}/{data}", f"{root}/{kind} {name}", how, shard, at, ports.pop())
        for name, how in CASES.items()
        if name in cases
        for kind, data, shard in (("redone", "broken", None), ("clean", "data", lost))
    }


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FAST, id="fast"),
        pytest.param(SLOW, id="slow", marks=pytest.mark.slow),
        pytest.param(REST, id="rest", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, int, set[str], list[Found]]:
    """Where the runs are, the lost shard, the step that first needs it, the cases, and what each rank found."""
    root = tmp_path_factory.mktemp("runs")
    make_mixture(root / "data", {"some": [4] * 9})
    lost, at = shard_first_needed_near(root / "data", {"some": 1}, 3)
    shutil.copytree(root / "data", root / "broken")
    (root / "broken" / "some" / "train" / f"{lost:05d}.tar").unlink()
    cases = sorted(request.param)
    ports = [free_port() for _ in range(2 * len(cases))]
    told = {"root": str(root), "lost": lost, "at": at, "ports": ports, "cases": cases}
    return root, lost, at, request.param, run_ranks(2, "tests.distributed.trainer.data.test_retire:pairs", **told)


def test_a_repeated_step_equals_one_made_once(
    runs: tuple[Path, int, int, set[str], list[Found]],
) -> None:
    """Weights, moments and ledger are those of a run without the lost shard."""
    root, lost, at, cases, ranks = runs
    for case in cases:
        for found in ranks:
            redone, clean = found[f"redone {case}"], found[f"clean {case}"]
            assert redone == clean and "error" not in clean, (case, redone, clean)
            assert redone["updates"] == at + 3, case
            assert [(s["step"], s["lost"]) for s in redone["ledger"]] == [(0, {}), (at, {"some": [lost]})]
        assert len(story(root / f"redone {case}")) == at + 3
        assert story(root / f"redone {case}") == story(root / f"clean {case}")

"""Sources of many small shards, which steps first need a shard, and several runs in one process."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.fixtures import make_source
from tests.helpers.order_twin import Leg, deal
from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.stream_truth import Truth, legs_of, shards_of
from tests.system.runs import TINY
from tests.system.test_resume import story
from trainer.config.pretrain import PretrainConfig
from trainer.run.folder import RunFolder

LANES, SEED = 4, 1337  # of TINY and of the config


def make_mixture(root: Path, documents: Mapping[str, Sequence[int]], vocab_size: int = 1024) -> Path:
    """A folder of sources with train/ and val/: so many documents in each shard, whose next token can be learnt."""
    rng = np.random.default_rng(0)

    def some(n: int) -> list[np.ndarray]:
        return [np.cumsum(rng.integers(0, 3, size=rng.integers(50, 300))) % vocab_size for _ in range(n)]

    for name, shards in documents.items():
        make_source(root / name / "train", [some(n) for n in shards], vocab_size=vocab_size)
        make_source(root / name / "val", [some(8)], vocab_size=vocab_size, split="val")
    return root


def mixture(root: Path, weights: Mapping[str, float]) -> tuple[str, ...]:
    """The overrides that train on the sources below `root` by these weights."""
    each = ", ".join(f"{name}: {{path: {name}, weight: {weight}}}" for name, weight in weights.items())
    return ("data=mix", f"data.lanes={LANES}", f"data.path={root}", f"data.sources={{{each}}}")


def state(run: Path) -> dict[str, Any]:
    latest = RunFolder(run).latest()
    assert latest is not None
    return RunFolder.state(latest)


def shard_first_needed_near(root: Path, weights: Mapping[str, int], step: int, source: str = "") -> tuple[int, int]:
    """(shard, step): a shard of `source`, or of the first, that no step needs before about this one, and which does.

    For runs of 8 windows of 64 tokens a step.
    """
    tokens = {name: [len(shard) for shard in shards_of(root / name / "train")] for name in weights}
    legs = [Leg(0, 0, 8, 64, dict(weights), {})]
    windows, taken = deal(tokens, legs, lanes=LANES, seed=SEED, steps=3 * step)
    number, first = sorted(weights).index(source or min(weights)), dict[int, int]()
    for at, positions in enumerate(taken):
        for s, shard, _ in (windows[p] for p in positions):
            if s == number:
                first.setdefault(shard, at)
    shard = min(first, key=lambda k: abs(first[k] - step))
    assert abs(first[shard] - step) < max(3, step // 10), first
    return shard, first[shard]


def check_fed(root: Path, run: Path, names: Sequence[str], dp: Mapping[range, int], until: int | None = None) -> Truth:
    """Rank 0 was fed, in each step, what is dealt by hand from the ledger that the run has written down.

    `dp`: how many data-parallel ranks there were in which steps.
    """
    told = state(run)
    steps = told["step"] if until is None else until
    truth = Truth(
        {name: shards_of(root / name / "train") for name in names},
        legs_of(told["data"]["ledger"]),
        lanes=LANES,
        seed=SEED,
        steps=steps,
    )
    rows = dict(story(run))
    for number in range(steps):
        ranks = next(n for some, n in dp.items() if number in some)
        assert rows[number + 1]["data/position"] == truth.taken[number][0], number
        assert rows[number + 1]["data/crc32"] == truth.crc32(number, 0, ranks), number
    return truth


def in_turn(runs: Sequence[tuple[Path, Sequence[str]]], ranks: int = 1) -> list[list[str]]:
    """`trainer.pretrain` of each (run folder, overrides), one after the other in the same processes: all but the start
    of Python is as in `runs.pretrain`. Returns, for each rank, what each run printed and, last, its refusal. Of
    several runs only the last may be refused: it leaves the ranks' process group as it is."""
    overrides = [[*TINY, f"run.dir={run}", *some] for run, some in runs]
    return run_ranks(
        ranks, "tests.system.mixtures:pretrain_each", runs=overrides, ports=[free_port() for _ in runs], timeout_s=280
    )


def pretrain_each(runs: list[list[str]], ports: list[int]) -> list[str]:
    from conf.errors import UserError
    from conf.schema import load
    from trainer.pretrain import pretrain

    said = []
    for overrides, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a second meeting in the same place hangs
        refusal = ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                pretrain(load(PretrainConfig, overrides))
            except UserError as e:
                refusal = f"error: {e}"
        said.append(printed.getvalue() + refusal)
    return said

"""Whole runs on a mixture whose weights, windows and batch change: killed, moved to other ranks, changed midway."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from tests.helpers.order_twin import zipped
from tests.helpers.stream_truth import legs_of, shards_of
from tests.system.mixtures import LANES, SEED, check_fed, in_turn, make_mixture, mixture, state
from tests.system.runs import TINY
from tests.system.test_bad_input import refused
from tests.system.test_resume import check_kills, story
from trainer.run.journal import read_journal

STEPS = 12
GROWING = (  # short windows at first; then the model's, in another mixture; a batch of 256 to 768 tokens
    "data.stages=[{step: 0, n_ctx: 32}, {step: 6, n_ctx: 64, weights: {books: 5}}]",
    "tokens_per_step=768",
    "batch_ramp.start=256",
    "batch_ramp.over=3000",
    "model.dropout=0.0",
    "checkpoint.keep=9",
)
DOCUMENTS = {"web": [6, 5, 4, 7, 3, 6], "books": [5, 4, 6], "code": [4, 4, 3]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("data"), DOCUMENTS)


@pytest.fixture(scope="module")
def grown(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `whole` and, the same after a kill -9 of rank 1, `killed`."""
    root = tmp_path_factory.mktemp("grown")
    check_kills(root, [(7, 1)], STEPS, *mixture(data, {"web": 3, "books": 1}), *GROWING)
    return root


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mixture_with_stages_and_a_ramp_is_exact_after_a_kill(data: Path, grown: Path) -> None:
    """It is fed the windows that a deal by hand gives; `grown` asserts that it is exact."""
    ledger = state(grown / "killed")["data"]["ledger"]
    assert {(s["n_ctx"], tuple(s["weights"].values())) for s in ledger} == {(32, (3, 1)), (64, (3, 5))}
    assert {s["windows_per_step"] * s["n_ctx"] for s in ledger} == {256, 384, 512, 768}
    for run in ("whole", "killed"):
        check_fed(data, grown / run, ["web", "books"], {range(STEPS): 2})
        assert state(grown / run)["optimizer_step"] == STEPS
        rows = {row.step: row.metrics for row in read_journal(grown / run / "metrics.jsonl")}
        validated = {step: row for step, row in rows.items() if "val/loss" in row}
        assert set(validated) == {5, 10, 12}
        for step, row in validated.items():
            web, books, weight = row["val/loss/web"], row["val/loss/books"], 1 if step == 5 else 5
            assert web != books and row["val/loss"] == pytest.approx((3 * web + weight * books) / (3 + weight))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one rank", "tp2"])
def test_a_mixture_has_the_same_windows_in_another_layout(data: Path, grown: Path, layout: str) -> None:
    run, ranks = grown / layout, 2 if layout == "tp2" else 1
    shutil.copytree(grown / "killed", run)
    (run / "checkpoints" / "latest").write_text("step-00000004.gen-0001")
    how = ("parallel=tp2",) if layout == "tp2" else ()
    common = (*mixture(data, {"web": 3, "books": 1}), *GROWING, f"max_steps={STEPS}", "eval.every=5")
    said = in_turn([(run, (*common, *how))], ranks)
    assert "goes on from step-00000004" in said[0][0]
    check_fed(data, run, ["web", "books"], {range(4): 2, range(4, STEPS): 1})
    for (step, ours), (_, whole) in zip(story(run), story(grown / "whole"), strict=True):
        assert ours.keys() == whole.keys() and ours["data/position"] == whole["data/position"]
        for key in ours.keys() & {"train/loss", "val/loss", "optim/grad_norm"}:
            assert ours[key] == pytest.approx(whole[key], rel=2e-5), (step, key)


@pytest.mark.slow
def test_a_resumed_run_takes_other_weights_batch_and_sources(data: Path, tmp_path: Path) -> None:
    """Each source goes on where it was."""
    run, ends = tmp_path / "run", [4, 8, 11, 15, 19]
    changes = [
        mixture(data, {"web": 3, "books": 1}),
        mixture(data, {"web": 1, "books": 2}),
        (*mixture(data, {"web": 1, "books": 2}), "tokens_per_step=1024"),
        (*mixture(data, {"web": 1, "books": 2, "code": 2}), "tokens_per_step=1024"),
        (*mixture(data, {"books": 2, "code": 2}), "tokens_per_step=1024"),
    ]
    common = ("optim.schedule.kind=constant", "checkpoint.every_steps=0")
    said = in_turn([(run, (*some, *common, f"max_steps={end}")) for some, end in zip(changes, ends, strict=True)])
    assert "error" not in said[0][-1], said[0][-1]
    told = state(run)
    assert [s["step"] for s in told["data"]["ledger"]] == [0, 4, 8, 11, 15]
    assert told["step"] == told["optimizer_step"] == len(story(run)) == 19
    truth = check_fed(data, run, list(DOCUMENTS), {range(19): 1})
    tokens = {name: [len(shard) for shard in shards_of(data / name / "train")] for name in DOCUMENTS}
    plan = Plan(tokens, Ledger.from_json(told["data"]["ledger"]), lanes=LANES, seed=SEED)
    assert [zipped(plan.step(step)[1]) for step in range(19)] == [truth.windows_of(step) for step in range(19)]
    total = [sum((n - 1) // 64 for n in tokens[name]) for name in sorted(tokens)]
    draws: Counter[tuple[int, int]] = Counter()
    served: Counter[tuple[int, ...]] = Counter()
    for position, (source, shard, start) in enumerate(truth.windows):
        lane = position % LANES
        served[source, (draws[source, lane] * LANES + lane) // total[source], shard, start] += 1
        draws[source, lane] += 1
    assert set(served.values()) == {1}, "a window twice in an epoch"
    assert max(epoch for source, epoch, *_ in served) > 0, "no epoch came to its end"
    assert legs_of(told["data"]["ledger"])[-1].weights["code"] > 0


@pytest.mark.slow
def test_a_document_mask_gives_one_loss_in_every_layout(data: Path, tmp_path: Path) -> None:
    """The loss differs from the one without a mask."""
    common = (*mixture(data, {"web": 3, "books": 1}), "max_steps=6")
    masked, split = (*common, "data.document_mask=true"), ("parallel=tp2", "parallel.sequence_parallel=true")
    in_turn([(tmp_path / "one", masked), (tmp_path / "none", common)])
    in_turn([(tmp_path / "two", masked), (tmp_path / "tp2", (*masked, *split))], ranks=2)
    one, two, tp2, none = (story(tmp_path / run) for run in ("one", "two", "tp2", "none"))
    for (step, a), (_, b), (_, c), (_, d) in zip(one, two, tp2, none, strict=True):
        assert a["data/crc32"] == c["data/crc32"] == d["data/crc32"], step
        for key in a.keys() & {"train/loss", "val/loss", "optim/grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=2e-5), (step, key)
            assert c[key] == pytest.approx(a[key], rel=2e-5), (step, key)
            assert d[key] != pytest.approx(a[key], rel=1e-4), (step, key)


def test_a_source_that_would_repeat_too_often_is_refused(data: Path, tmp_path: Path) -> None:
    """The run is refused before anything starts."""
    sources = "data.sources={web: {path: web, weight: 3}, books: {path: books, max_epochs: 1}}"
    common = [*TINY, "data=mix", "data.lanes=4", f"data.path={data}", sources, f"run.dir={tmp_path / 'run'}"]
    line = refused("trainer.pretrain", *common, "max_steps=100")
    assert "data.sources.books.max_epochs=1" in line and "max_steps=100" in line and "weight" in line, line
    step = int(line.split("used up in step ")[1].split()[0])
    windows = sum((len(shard) - 1) // 64 for shard in shards_of(data / "books" / "train"))
    # a quarter of 8 windows a step; a lane may be a window ahead of the others
    assert windows / 2 - LANES <= step <= windows / 2, (line, windows)
    assert not (tmp_path / "run").exists()


def test_the_summary_lists_each_stage_and_each_batch_size(data: Path, tmp_path: Path) -> None:
    [[said]] = in_turn([(tmp_path / "run", (*mixture(data, {"web": 3, "books": 1}), *GROWING, "max_steps=8"))])
    first = "from step 0 (0 tokens): 8 windows of 32 tokens a step = dp 1 x micro batch 2 x 4; web 0.75, books 0.25"
    assert first in said, said
    assert re.search(r"windows of 64 tokens a step = dp 1 x micro batch \d x \d+; web 0.375, books 0.625", said), said
    assert "8 shards open at once on each data-parallel rank, at most 0 MiB" in said, said  # 4 lanes, 2 sources

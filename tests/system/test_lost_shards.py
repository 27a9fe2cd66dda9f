"""A shard lost while a run goes on: it stops and says so, or all ranks go on without it from the same step on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.system.mixtures import check_fed, in_turn, make_mixture, mixture, shard_first_needed_near, state
from tests.system.runs import finish, kill_at, pretrain, start
from tests.system.test_resume import story, weights
from trainer.run.folder import RunFolder

WEIGHTS = {"books": 1, "web": 3}
AT, STEPS = 3, 14  # the checkpoint that all start from, before the shard is lost
SKIP = ("data.on_bad_shard=skip", "checkpoint.every_steps=1", "checkpoint.keep=20", "optim.schedule.kind=constant")


class Home:
    def __init__(self, root: Path) -> None:
        self.root = root
        make_mixture(root / "data", {"web": [4] * 9, "books": [4] * 4})
        self.lost, self.step = shard_first_needed_near(root / "data", WEIGHTS, 7, "web")
        assert AT < self.step < STEPS - 3
        shutil.copytree(root / "data", root / "broken")
        self.shard = root / "broken" / "web" / "train" / f"{self.lost:05d}.tar"
        self.shard.unlink()
        whole, broken = mixture(root / "data", WEIGHTS), mixture(root / "broken", WEIGHTS)
        self.goes_on = (*broken, *SKIP, f"max_steps={STEPS}", "model.dropout=0.1")
        begins = (*whole, *SKIP, f"max_steps={AT}", "model.dropout=0.1")
        stops = (*self.goes_on, "data.on_bad_shard=stop")
        runs = [(name, begins) for name in ("skip", "killed", "stop", "tp2")]
        self.said = in_turn([(root / name, how) for name, how in [*runs, ("skip", self.goes_on), ("stop", stops)]], 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("lost"))


def test_a_lost_shard_stops_all_ranks_and_is_named(home: Home) -> None:
    """Before the step that needs it."""
    words = [said[-1].splitlines()[-1] for said in home.said]
    assert all(word.startswith("error: ") for word in words), words
    assert any(str(home.shard) in word for word in words), words
    assert state(home.root / "stop")["step"] == state(home.root / "stop")["optimizer_step"] == home.step
    assert [step for step, _ in story(home.root / "stop")] == list(range(1, home.step + 1))


def test_skip_goes_on_without_a_lost_shard(home: Home) -> None:
    """On both ranks from the same step on."""
    run = home.root / "skip"
    told = state(run)
    assert told["step"] == told["optimizer_step"] == len(story(run)) == STEPS
    assert [(s["step"], s["lost"]) for s in told["data"]["ledger"]] == [(0, {}), (home.step, {"web": [home.lost]})]
    assert f"step {home.step}  goes on without a shard: {home.shard}" in home.said[0][-2], home.said[0][-2]
    truth = check_fed(home.root / "data", run, list(WEIGHTS), {range(STEPS): 2})
    web = sorted(WEIGHTS).index("web")
    assert all((web, home.lost) != w[:2] for step in range(home.step, STEPS) for w in truth.windows_of(step))
    before = story(home.root / "stop")
    assert story(run)[: home.step] == before, "the steps before were made otherwise"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_skipped_a_shard_is_exact_after_a_kill(home: Home) -> None:
    run = home.root / "killed"
    last = kill_at(start(run, *home.goes_on, ranks=2), run / "metrics.jsonl", home.step + 2, 1)
    assert last < STEPS and state(run)["data"]["ledger"][-1]["lost"] == {"web": [home.lost]}
    pretrain(run, *home.goes_on, ranks=2)
    assert story(run) == story(home.root / "skip")
    assert weights(run) == weights(home.root / "skip")
    assert state(run)["data"]["ledger"] == state(home.root / "skip")["data"]["ledger"]


@pytest.mark.slow
def test_tensor_parallel_ranks_skip_what_their_reader_has_lost(home: Home) -> None:
    """All windows of a step go to one reader: each byte of them is held against the shards."""
    run = home.root / "tp2"
    in_turn([(run, (*home.goes_on, "model.dropout=0", "parallel=tp2"))], 2)
    assert state(run)["optimizer_step"] == STEPS
    assert state(run)["data"]["ledger"] == state(home.root / "skip")["data"]["ledger"]
    check_fed(home.root / "data", run, list(WEIGHTS), {range(AT): 2, range(AT, STEPS): 1})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_shard_deleted_during_a_run_is_skipped(tmp_path: Path) -> None:
    """So late that neither rank can have read any of it ahead."""
    data = make_mixture(tmp_path / "data", {"web": [12] * 70})
    lost, step = shard_first_needed_near(data, {"web": 1}, 160)
    shutil.copytree(data, tmp_path / "kept")
    run, common = tmp_path / "run", (*mixture(data, {"web": 1}), *SKIP, f"max_steps={step + 5}")
    ranks = start(run, *common, "checkpoint.every_steps=0", ranks=2)
    deadline = time.monotonic() + 200
    while not RunFolder(run).config.exists():  # its sources are open, its loader is about to be
        assert time.monotonic() < deadline and all(p.poll() is None for p in ranks)
        time.sleep(0.01)
    (data / "web" / "train" / f"{lost:05d}.tar").unlink()
    ended = finish(ranks)
    assert all(code == 0 for code, _ in ended), ended
    assert [(s["step"], s["lost"]) for s in state(run)["data"]["ledger"]] == [(0, {}), (step, {"web": [lost]})]
    assert state(run)["optimizer_step"] == len(story(run)) == step + 5
    check_fed(tmp_path / "kept", run, ["web"], {range(step + 5): 2})

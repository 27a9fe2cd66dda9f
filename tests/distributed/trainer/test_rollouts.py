"""A feed of made-up roll-outs, each of which serves several steps, under the real Trainer on two gloo ranks.

The trainer knows nothing of it but the protocol: it is killed and resumed bit for bit, rolled back over bad roll-outs,
saved at the ends of iterations only, and stopped by a signal inside of one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.stream.loader import Batch
from tests.helpers.ranks import run_ranks
from tests.system.runs import TINY
from tests.system.test_resume import weights
from trainer.config.pretrain import PretrainConfig
from trainer.data.feed import ValidationSet
from trainer.data.step_size import StepSize
from trainer.run.folder import RunFolder, step_of
from trainer.run.journal import read_journal

HERE = "tests.distributed.trainer.test_rollouts"
EACH, PROMPTS, T, MARKER = 3, 4, 16, 1023
KEYS = ("train/loss", "optim/grad_norm", "rollout/position", "rollout/score")


class RollOuts:
    """Roll-outs as a pure function of (weights, seed, position); a position is a prompt. One serves EACH steps.

    `bad`: the first positions of roll-outs that hold the marker. `at`: called with each step before it.
    """

    plan = None

    def __init__(self, engine: Any, state: Mapping[str, Any], bad: Sequence[int], at: Any) -> None:
        self.engine = engine
        self.first = state.get("step", 0)
        self.first_position = state["data"]["position"] if "data" in state else 0
        self.bad, self.at = bad, at
        self.step = self.first
        self.score = 0.0

    def next(self) -> tuple[list[Batch], None]:
        self.at(self.step)
        if self.step % EACH == 0:  # a roll-out, with the weights of now
            self.score = float(self.engine.evaluate(self._batch(self.step))[0])
        self.step += 1
        return [self._batch(self.step - 1)], None

    def _batch(self, step: int) -> Batch:
        position, mesh = self.position(step), self.engine.mesh
        g = torch.Generator().manual_seed(1_000_000 + 1000 * position + step % EACH)
        ids = torch.randint(0, MARKER, (PROMPTS, T + 1), generator=g)
        if position in self.bad:
            ids[:, 0] = MARKER
        ids = ids.chunk(mesh.dp)[mesh.dp_rank]
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def position(self, step: int) -> int:
        return self.first_position + (step - self.first) // EACH * PROMPTS

    def size(self, step: int) -> StepSize:
        return StepSize(PROMPTS, T, step * PROMPTS, fixed=False)

    def may_save(self, step: int) -> bool:
        return step % EACH == 0

    def row(self, step: int) -> dict[str, float]:
        return {"rollout/position": self.position(step - 1), "rollout/score": self.score}

    def validation(self, step: int) -> Sequence[ValidationSet]:
        return [ValidationSet("made up", 1.0, iter([(self._batch(0), None)]))]

    def retire(self, error: Any) -> list[str]:
        raise AssertionError("nothing can be lost")

    def jump(self, step: int, end: int) -> dict[str, Any]:
        return {"position": self.position(-(-end // EACH) * EACH)}

    def state(self, step: int) -> dict[str, Any]:
        return {"position": self.position(step)}

    def summary(self) -> list[str]:
        return [f"data: {PROMPTS} made-up prompts a roll-out"]

    def close(self) -> None:
        pass


def train(run: str, how: list[str], bad: list[int], kill: int = -1, stop: int = -1, pause_s: float = 0.0) -> Any:
    """A start of a run: what it says when it is stopped. Rank 1 ends at step `kill`, and is told to at step `stop`."""
    from conf.frozen import freeze
    from conf.schema import load
    from trainer.distributed.world import read_world
    from trainer.loop import Trainer
    from trainer.objective.language_model import LanguageModel
    from trainer.run import signals
    from trainer.task import Task

    class Marked(LanguageModel):
        def sums(self, module: Any, batch: Batch) -> Tensor:
            return super().sums(module, batch) * (torch.nan if bool((batch.tokens == MARKER).any()) else 1.0)

    world = read_world()

    def at(step: int) -> None:
        time.sleep(pause_s)
        if world.rank == 1 and step == kill:
            os._exit(9)
        if world.rank == 1 and step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # until the thread that listens has it

    signals.OF_THIS_PROCESS.install()
    cfg = load(PretrainConfig, [*TINY, "data.path=none", f"run.dir={run}", "checkpoint.keep=9", *how])
    task = Task(Marked(), lambda engine, state: RollOuts(engine, state, bad, at), eval_every=4)
    try:
        with Trainer(cfg, freeze(cfg), world, task) as trainer:
            trainer.train()
    except signals.Stopped as e:
        return str(e)
    return "done"


def start(run: Path, *how: str, bad: Sequence[int] = (), **events: float) -> str:
    answers = run_ranks(2, f"{HERE}:train", run=str(run), how=how, bad=list(bad), **events)
    assert answers[0] == answers[1]
    return str(answers[0])


def story(run: Path) -> dict[int, list[float]]:
    """The last word on each step."""
    rows = read_journal(run / "metrics.jsonl")
    return {row.step: [row.metrics[key] for key in KEYS] for row in rows if "train/loss" in row.metrics}


def saved(run: Path) -> list[int]:
    return sorted({step_of(path) for path in RunFolder(run).published()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(run, "max_steps=12", "checkpoint.every_steps=2") == "done"
    return run


def test_checkpoints_and_validations_fall_on_iteration_ends(whole: Path) -> None:
    """Due after steps 2, 4, 6, ..., they are made after 3, 6, ...: where a roll-out has served its steps."""
    assert saved(whole) == [3, 6, 9, 12]
    rows = read_journal(whole / "metrics.jsonl")
    assert [row.step for row in rows if "val/loss" in row.metrics] == [6, 9, 12]
    assert [position for _, _, position, _ in story(whole).values()] == [n // EACH * PROMPTS for n in range(12)]


def test_a_run_killed_inside_an_iteration_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """The iteration is repeated from its roll-out on."""
    run, how = tmp_path / "run", ("max_steps=12", "checkpoint.every_steps=2")
    with pytest.raises(AssertionError, match="rank 1 exited 9"):
        start(run, *how, kill=7)
    assert saved(run)[-1] in (3, 6)
    assert start(run, *how) == "done"
    assert story(run) == story(whole)
    assert weights(run) == weights(whole) != {}


def test_a_rollback_goes_on_behind_the_bad_roll_out(tmp_path: Path) -> None:
    """The roll-out of steps 6 to 8 is bad: the run goes back to step 6, and takes the next one there."""
    run = tmp_path / "run"
    how = ("max_steps=12", "checkpoint.every_steps=3", "guard.skips=2", "guard.within=3")
    assert start(run, *how, bad=[2 * PROMPTS]) == "done"
    positions = [position // PROMPTS for _, _, position, _ in story(run).values()]
    assert positions == [0, 0, 0, 1, 1, 1, 3, 3, 3, 4, 4, 4]
    assert saved(run) == [3, 6, 9, 12]


def test_a_stop_signal_finishes_the_iteration(whole: Path, tmp_path: Path) -> None:
    """SIGTERM at step 4: the run saves after step 6, and goes on from there as if it had never stopped."""
    run, how = tmp_path / "run", ("max_steps=12", "checkpoint.every_steps=2")
    said = start(run, *how, stop=4)
    assert said.startswith("stopped by SIGTERM after step 6, saved ") and "step-00000006" in said
    assert start(run, *how) == "done"
    assert story(run) == story(whole)


def test_a_stop_signal_with_too_little_grace(tmp_path: Path) -> None:
    """Three steps of two seconds do not fit into watch.stop_s=1."""
    said = start(tmp_path / "run", "max_steps=12", "checkpoint.every_steps=3", "watch.stop_s=1", stop=3, pause_s=2)
    assert said.startswith("stopped by SIGTERM after step 5, inside an iteration") and "step-00000003" in said


@pytest.mark.slow
def test_max_hours_end_a_run_where_an_iteration_ends(tmp_path: Path) -> None:
    """They are over after the first step, by the clock of rank 0; both ranks stop after the third."""
    run = tmp_path / "run"
    assert start(run, "max_steps=12", "checkpoint.every_steps=0", "max_hours=1e-9") == "done"
    assert (saved(run), sorted(story(run))) == ([3], [1, 2, 3])
    assert str(RunFolder(run).ended()).startswith("max_hours=1e-09: ")


def test_a_schedule_in_tokens_is_refused_without_fixed_windows(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"optim\.schedule\.unit=tokens, but the examples"):
        start(tmp_path / "run", "max_steps=12", "optim.schedule.unit=tokens")
    with pytest.raises(AssertionError, match="max_steps=11 is inside an iteration: give max_steps=12"):
        start(tmp_path / "run", "max_steps=11")

"""kill -9 at random moments of every tuning, saving included: the run is the one that was left alone, bit for bit."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Process
from tests.helpers.seeds import seeded
from tests.system.runs import finish
from tests.system.test_resume import weights
from tests.system.tunings import conversation, json_lines, small_base, start, tune
from trainer.run.journal import read_journal

KILLS = int(os.environ.get("TEST_KILLS", "2"))
STEPS = 8 + 8 * KILLS
EXACT = ("train/", "val/", "optim/", "data/", "reward/", "task/")
SAVING = ("checkpoint.every_steps=1", "checkpoint.keep=3", "held_out.fraction=0.25", "held_out.every=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base"))


def text(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefgh", k=rng.randint(1, 9)))


def records(entry: str, rng: random.Random) -> list[dict[str, Any]]:
    """Examples of the form that a tuning reads."""
    some = range(48)
    if entry == "sft":
        return [conversation(*(text(rng) for _ in range(2 * rng.randint(1, 2)))) for _ in some]
    if entry == "finetune":
        return [{"text": text(rng), "label": rng.choice(("a", "b"))} for _ in some]
    sizes = [rng.randint(2, 4) for _ in some]
    answers = [[f"{text(rng)}{k}" for k in range(n)] for n in sizes]
    return [
        {"prompt": f"{text(rng)} {i}", "responses": x, "ranks": [*range(1, len(x) + 1)]} for i, x in enumerate(answers)
    ]


def settings(entry: str, base: Path, examples: Path) -> list[str]:
    own = {
        "sft": [],
        "reward": ["compile=off", "checkpoint.keep_best=false"],
        "dpo": ["compile=off"],
        "finetune": ["compile=off", "examples.task=classification", "examples.texts=[text]", "examples.classes=[a,b]"],
    }[entry]
    size = ("batch_size=8", "micro_batch_size=2", f"max_steps={STEPS}", "epochs=0", "model.dropout=0.1")
    return [f"init_from={base}", f"examples.path={examples}", *size, *SAVING, *own]


def story(run: Path) -> list[tuple[int, dict[str, float]]]:
    """All that must be equal, of every step; what a step is given by several rows is one."""
    found: dict[int, dict[str, float]] = {}
    for row in read_journal(run / "metrics.jsonl"):
        found.setdefault(row.step, {}).update({k: v for k, v in row.metrics.items() if k.startswith(EXACT)})
    return sorted(found.items())


def kill(processes: list[Process], journal: Path, step: int, rng: random.Random) -> None:
    """SIGKILL to one rank, a moment after `step` is logged: the next step or a checkpoint is under way."""
    deadline = time.monotonic() + 300
    while not (journal.exists() and any(row.step >= step for row in read_journal(journal))):
        dead = [p for p in processes if p.poll() is not None]
        assert not dead and time.monotonic() < deadline, f"step {step} was not reached: {[p.returncode for p in dead]}"
        time.sleep(0.002)
    after_s, rank = rng.uniform(0, 0.08), rng.randrange(len(processes))
    time.sleep(after_s)
    processes[rank].kill()
    finish(processes)
    print(
        f"rank {rank} was killed {after_s:.3f} s after step {step}, with step {read_journal(journal)[-1].step} logged"
    )


@pytest.mark.slow
@pytest.mark.timeout(600 + 120 * KILLS)
@pytest.mark.parametrize("entry", ["finetune", "sft", "reward", "dpo"])
def test_kills_of_a_tuning_change_no_bit(entry: str, base: Path, tmp_path: Path) -> None:
    """TEST_KILLS=N: so many."""
    rng = random.Random(seeded())
    common = settings(entry, base, json_lines(tmp_path / "a.jsonl", records(entry, rng)))
    tune(entry, tmp_path / "whole", *common, ranks=2)
    run = tmp_path / "run"
    for step in sorted(rng.sample(range(1, STEPS - 4), KILLS)):
        processes = start(entry, run, *common, ranks=2)
        try:
            kill(processes, run / "metrics.jsonl", step, rng)
        finally:
            for process in processes:
                process.kill()
    tune(entry, run, *common, ranks=2)
    assert len(list((run / "generations").iterdir())) == KILLS + 1
    assert story(run) == story(tmp_path / "whole") and len(story(run)) == STEPS
    assert weights(run) == weights(tmp_path / "whole")

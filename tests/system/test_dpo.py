"""`python -m trainer.dpo` as a user runs it: from a pre-trained base, killed and resumed, without its base."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest

from tests.helpers.chat import random_text, write_lines
from tests.helpers.ranks import Process
from tests.system.runs import finish, kill_at, pretrain
from tests.system.test_resume import story, weights
from tests.system.tunings import launch, small_base, succeed
from trainer.run.journal import read_journal

TINY = (
    "model=test",
    "model.vocab_size=257",
    "optim.lr=1e-3",
    "optim.schedule.warmup=1",
    "batch_size=8",
    "micro_batch_size=2",
    "epochs=0",
    "checkpoint.every_steps=4",
    "tracking=none",
)
STEPS = 12


def comparisons_of(root: Path, seed: int = 0) -> Path:
    """Some of two answers, some of more and with ties."""
    rng = random.Random(seed)
    records = []
    for i in range(60):
        answers = [f"{random_text(rng)[:10].strip()} {n}" for n in range(rng.choice((2, 2, 4)))]
        ranks = [rng.randint(1, 3) for _ in answers]
        ranks[0] = 4
        records.append({"prompt": f"say {i}", "responses": answers, "ranks": ranks})
    return write_lines(root / "comparisons.jsonl", records)


def start(run_dir: Path, *overrides: str, ranks: int = 1) -> list[Process]:
    return launch("dpo", [*TINY, f"run.dir={run_dir}", *overrides], ranks)


def dpo(run_dir: Path, *overrides: str, ranks: int = 1) -> None:
    succeed(start(run_dir, *overrides, ranks=ranks))


@pytest.mark.slow
def test_a_run_is_exact_after_a_kill_without_its_base(tmp_path: Path) -> None:
    """Its vocabulary has grown by the tokens of roles; the reference has the same rows, so the first loss is ln 2."""
    base = small_base(tmp_path)
    common = (
        f"init_from={base}",
        f"examples.path={comparisons_of(tmp_path)}",
        f"max_steps={STEPS}",
        "held_out.fraction=0.2",
        "held_out.every=5",
        "precision=fp32",
    )
    dpo(tmp_path / "whole", *common, ranks=2)
    first, *_, last = (row.metrics for row in read_journal(tmp_path / "whole" / "metrics.jsonl"))
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-4) and first["train/accuracy"] == 0.5
    assert first["train/margin"] == 0 and last["train/margin"] > 0
    assert {"train/chosen", "train/rejected", "val/accuracy", "val/margin"} <= last.keys()
    killed = tmp_path / "killed"
    at = kill_at(start(killed, *common, ranks=2), killed / "metrics.jsonl", 6, 1)
    assert at < STEPS, "the run ended before the kill: nothing was tested"
    shutil.rmtree(base)
    dpo(killed, *common, ranks=2)
    assert story(killed) == story(tmp_path / "whole") and len(story(killed)) == STEPS
    assert weights(killed) == weights(tmp_path / "whole")
    kept = [
        {path.name: path.read_bytes() for path in (run / "reference").iterdir()} for run in (killed, tmp_path / "whole")
    ]
    assert kept[0] == kept[1] and "weights-00000.safetensors" in kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel=zero3", "parallel=tp2"])
def test_the_first_loss_is_ln_2_in_bf16(tmp_path: Path, layout: str) -> None:
    """The reference computes as the model does: their rounding is the same, too."""
    common = (f"init_from={small_base(tmp_path)}", f"examples.path={comparisons_of(tmp_path)}", "max_steps=2", layout)
    dpo(tmp_path / "run", *common, "precision=bf16", ranks=2)
    first, second = (row.metrics for row in read_journal(tmp_path / "run" / "metrics.jsonl"))
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert second["train/margin"] != 0


@pytest.mark.slow
def test_a_new_start_from_another_base_is_refused(tmp_path: Path) -> None:
    """The run has no checkpoint yet, and the reference of its first start; a damaged reference is refused too."""
    base, run = small_base(tmp_path), tmp_path / "run"
    common = (
        f"examples.path={comparisons_of(tmp_path)}",
        "max_steps=1000",
        "checkpoint.every_steps=0",
        "precision=fp32",
    )
    kill_at(start(run, f"init_from={base}", *common), run / "metrics.jsonl", 2, 0)
    pretrain(base, f"data.path={tmp_path / 'data'}", "max_steps=4", "model.vocab_size=257")
    [(code, err)] = finish(start(run, f"init_from={base}", *common))
    assert code == 2 and "reference holds other weights than init_from=" in err
    assert "give the init_from that this run began with, or another run.name" in err
    [file] = (run / "reference").glob("weights-*")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    [(code, err)] = finish(start(run, f"init_from={base}", *common))
    assert code == 2 and f"{file.name}: its sha256 is not the manifest's" in err

"""A run folder and shards that commit b0e4a7b wrote (tests/data/README.md) are resumed and read by today's code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BEFORE = ROOT / "tests" / "data" / "before"
ROUNDED = ("train/loss", "val/loss", "optim/grad_norm")  # another kind of processor may round them differently


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy of the folder, which a test may write into."""
    return shutil.copytree(BEFORE, tmp_path / "before")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))


def command(module: str, *words: str) -> str:
    """What `python -m module words` printed, in one process with one thread."""
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env = {**ours, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    argv = [sys.executable, "-m", module, *words]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_goes_on_with_the_same_numbers(before: Path, expected: dict[str, Any]) -> None:
    run, old = before / "run", journal(before / "run")
    given = (f"data.path={before / 'shards'}", f"run.dir={run}", "run.name=before", "max_steps=8", "resume=must")
    command("trainer.pretrain", *expected["settings"], *given)
    lines = journal(run)
    assert lines[: len(old)] == old
    first, *rest = lines[len(old) :]
    assert (first["resumed_at"], first["generation"]) == (4, 2)
    rows: dict[str, dict[str, float]] = {}
    for line in rest:
        rows.setdefault(str(line["step"]), {}).update(line["metrics"])
    assert rows.keys() == expected["rows"].keys()
    for step, wanted in expected["rows"].items():
        for key, value in wanted.items():
            exact = key not in ROUNDED
            assert rows[step].get(key) == (value if exact else pytest.approx(value, rel=1e-5)), (step, key)


def test_shards_are_whole_and_hold_the_same_tokens(before: Path, expected: dict[str, Any]) -> None:
    shards, out = before / "shards", before / "tokens.bin"
    said = command("data_pipeline.shards", "verify", f"path={shards}")
    assert "2 sources, 4 shards, 28 documents, 9,406 tokens" in said
    command("data_pipeline.shards", "export", f"path={shards / 'train'}", f"output={out}")
    assert hashlib.sha256(out.read_bytes()).hexdigest() == expected["exported_sha256"]

"""A run of a banded model as a user starts it: what it says at the start holds at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT, free_port, rank_env
from tests.system.runs import TINY, make_data
from trainer.run.folder import RunFolder


def command(module: str, *overrides: str) -> str:
    """What an entry of ours prints."""
    ended = subprocess.run(
        [sys.executable, "-m", module, *overrides],
        env=rank_env(0, 1, free_port()),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
def test_a_banded_run_says_what_it_leaves_out_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    banded = (*TINY, f"run.dir={run}", f"data.path={make_data(tmp_path / 'data')}", "model.attention=DB")
    told = command("trainer.pretrain", *banded, "model.band=9", "max_steps=4")
    assert told.count("the last checkpoint gets no Hugging Face files: model=test has attention=DB, band=9") == 1
    told = command("trainer.pretrain", *banded, "model.band=9", "max_steps=6")
    assert "goes on from step-00000004" in told
    last = RunFolder(run).latest()
    assert last is not None and last.name.startswith("step-00000006")
    assert not {"model.safetensors", "config.json"} & {p.name for p in last.iterdir()}

"""A tiny run as it is really started: launch.supervise, torchrun (or the quick tests.helpers.direct), two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.ranks import ROOT
from tests.system.runs import TINY


def supervised(
    run: Path, *overrides: str, entry: str = "trainer.pretrain", direct: bool = False, max_restarts: int = 6
) -> subprocess.Popen[str]:
    """`overrides` are the entry's; stderr is kept."""
    supervise = ["launch.supervise", f"run.dir={run}", f"max_restarts={max_restarts}", "backoff_s=0.05", "grace_s=5"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", entry]
    launcher = ["tests.helpers.direct", "2", entry] if direct else torchrun
    words = [sys.executable, "-m", *supervise, "--", sys.executable, "-m", *launcher]
    return subprocess.Popen(
        [*words, *TINY, f"run.dir={run}", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "supervise.jsonl").read_text().splitlines()]

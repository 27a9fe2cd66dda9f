"""Run a function on several real ranks (gloo, loopback) and get what each returned.

    losses = run_ranks(2, "tests.distributed.test_x:losses_of", tp=2)

starts two Python processes in which `losses_of(tp=2)` runs with RANK, WORLD_SIZE and LOCAL_RANK set. The
function is named, not pickled; arguments and results travel as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """One below those that the kernel gives to outgoing connections, for nobody holds it until it is used."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port := secrets.choice(range(16384, 32768))))
            return port


def rank_env(rank: int, world_size: int, port: int, device: str = "cpu") -> dict[str, str]:
    """The environment that torchrun would give, with one thread for each rank; `device` cpu or cuda."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
        "PYTHONPATH": str(ROOT),
    }


def run_ranks(
    world_size: int, target: str, *, timeout_s: float = 240.0, device: str = "cpu", **kwargs: Any
) -> list[Any]:
    """What `target` ("module:function") returned on each rank, in rank order; `device` cpu or cuda.

    Raises:
        AssertionError: a rank failed or the time ran out; carries the ranks' stderr.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as tmp:
        procs = []
        for rank in range(world_size):
            err = (Path(tmp) / f"{rank}.err").open("w")
            argv = [
                sys.executable,
                "-m",
                "tests.helpers.ranks",
                target,
                json.dumps(kwargs),
                str(Path(tmp) / f"{rank}.json"),
            ]
            procs.append(
                subprocess.Popen(argv, env=rank_env(rank, world_size, port, device), stdout=err, stderr=err, cwd=ROOT)
            )
        failed = _wait(procs, timeout_s)
        if failed:
            logs = "\n".join(f"--- rank {r}\n{(Path(tmp) / f'{r}.err').read_text()[-4000:]}" for r in range(world_size))
            raise AssertionError(f"{target} on {world_size} ranks: {failed}\n{logs}")
        return [json.loads((Path(tmp) / f"{r}.json").read_text()) for r in range(world_size)]


def _wait(procs: list[subprocess.Popen[bytes]], timeout_s: float) -> str:
    """Empty when all ended well; the first failure ends the others, which would wait for it for ever."""
    deadline = time.monotonic() + timeout_s
    failed = ""
    while not failed and any(p.poll() is None for p in procs):
        if time.monotonic() > deadline:
            failed = f"no end after {timeout_s} s"
        failed = failed or next((f"rank {r} exited {p.returncode}" for r, p in enumerate(procs) if p.poll()), "")
        time.sleep(0.05)
    failed = failed or next((f"rank {r} exited {p.returncode}" for r, p in enumerate(procs) if p.returncode), "")
    for p in procs:
        if p.poll() is None:
            p.kill()
        p.wait()
    return failed


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result))

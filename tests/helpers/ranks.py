"""Run a function on several real ranks (gloo, loopback) and get what each returned.

    losses = run_ranks(2, "tests.distributed.test_x:losses_of", tp=2)

starts two Python processes in which `losses_of(tp=2)` runs with RANK, WORLD_SIZE and LOCAL_RANK set. The
function is named, not pickled; arguments and results travel as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import secrets
import socket
import tempfile
import time
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
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
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            env = rank_env(rank, world_size, port, device)
            out = str(Path(tmp) / str(rank))
            Path(f"{out}.err").touch()
            processes.append(_context(device).Process(target=_run, args=(env, target, json.dumps(kwargs), out)))
            processes[-1].start()
        failed = _wait(processes, timeout_s)
        if failed:
            logs = "\n".join(f"--- rank {r}\n{(Path(tmp) / f'{r}.err').read_text()[-4000:]}" for r in range(world_size))
            raise AssertionError(f"{target} on {world_size} ranks: {failed}\n{logs}")
        return [json.loads((Path(tmp) / f"{r}.json").read_text()) for r in range(world_size)]


@cache
def _context(device: str) -> ForkServerContext | SpawnContext:
    """Ranks on a CPU are forks of one process that has imported the libraries: seconds less for each rank."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.tiny_run"])
    before = dict(os.environ)
    os.environ.update(rank_env(0, 1, 0))  # what the libraries read when they are imported
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(env: dict[str, str], target: str, kwargs: str, out: str) -> None:
    """A rank's process: writes what the function returns to `out`.json, what it prints to `out`.err."""
    with Path(f"{out}.err").open("ab") as err:
        os.dup2(err.fileno(), 1)
        os.dup2(err.fileno(), 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(kwargs))
    Path(f"{out}.json").write_text(json.dumps(result))


def _wait(processes: list[BaseProcess], timeout_s: float) -> str:
    """Empty when all ended well; the first failure ends the others, which would wait for it for ever."""
    deadline = time.monotonic() + timeout_s
    failed = ""
    while not failed and any(p.is_alive() for p in processes):
        if time.monotonic() > deadline:
            failed = f"no end after {timeout_s} s"
        failed = failed or next((f"rank {r} exited {p.exitcode}" for r, p in enumerate(processes) if p.exitcode), "")
        time.sleep(0.05)
    failed = failed or next((f"rank {r} exited {p.exitcode}" for r, p in enumerate(processes) if p.exitcode), "")
    for p in processes:
        p.kill()
        p.join()
    return failed

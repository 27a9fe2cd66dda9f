"""Run a function on several real ranks (gloo, loopback) and get what each returned.

    losses = run_ranks(2, "tests.distributed.test_x:losses_of", tp=2)

starts two processes in which `losses_of(tp=2)` runs with RANK, WORLD_SIZE and LOCAL_RANK set. The function is named,
not pickled; arguments and results travel as JSON. Ranks on a CPU are forks of one process that has imported the
libraries, which saves each of them seconds. `start_module` starts `python -m MODULE` in the same way.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
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
    world_size: int, target: str, *, timeout_s: float = 800.0, device: str = "cpu", **kwargs: Any
) -> list[Any]:
    """What `target` ("module:function") returned on each rank, in rank order; `device` cpu or cuda.

    Raises:
        AssertionError: a rank failed or the time ran out; carries the ranks' stderr.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as tmp:
        results = [Path(tmp) / f"{rank}.json" for rank in range(world_size)]
        ranks = [
            Process(rank_env(rank, world_size, port, device), device, call=target, kwargs=kwargs, result=str(result))
            for rank, result in enumerate(results)
        ]
        if failed := _wait(ranks, timeout_s):
            logs = "\n".join(f"--- rank {r}\n{rank.communicate()[1][-4000:]}" for r, rank in enumerate(ranks))
            raise AssertionError(f"{target} on {world_size} ranks: {failed}\n{logs}")
        return [json.loads(result.read_text()) for result in results]


def start_module(module: str, argv: list[str], env: dict[str, str], device: str = "cpu") -> Process:
    """`python -m MODULE ARGV...`, whose stderr is kept; `device` cpu or cuda."""
    return Process(env, device, module=module, argv=argv)


class Process:
    """A process that the server forks: what tests use of subprocess.Popen."""

    def __init__(self, env: dict[str, str], device: str, **what: Any) -> None:
        self._files = tempfile.TemporaryDirectory()
        self._out = Path(self._files.name) / "process"
        self._err.touch()
        server = _server(device)
        assert server.stdin is not None
        self._server = server
        server.stdin.write(f"{json.dumps({'env': env, 'out': str(self._out), **what})}\n".encode())

    @property
    def _err(self) -> Path:
        return self._out.with_suffix(".err")

    @property
    def pid(self) -> int:
        while not (file := self._out.with_suffix(".pid")).exists():
            assert self._server.poll() is None, "the process that forks ranks has ended"
            time.sleep(0.005)
        return int(file.read_text())

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        assert self._server.poll() is None, "the process that forks ranks has ended"
        code = self._out.with_suffix(".code")
        return int(code.read_text()) if code.exists() else None

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self._out), timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        self.wait(timeout)
        return None, self._err.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _server(device: str) -> subprocess.Popen[bytes]:
    """The process that forks ranks, and ends with this one, when its stdin does."""
    argv, env = [sys.executable, "-m", "tests.helpers.ranks", device], rank_env(0, 1, 0, device)
    return subprocess.Popen(argv, env=env, cwd=ROOT, stdin=subprocess.PIPE, bufsize=0)


def _wait(ranks: list[Process], timeout_s: float) -> str:
    """Empty when all ended well; the first failure ends the others, which would wait for it for ever."""
    deadline, failed = time.monotonic() + timeout_s, ""
    while not failed and None in (codes := [rank.poll() for rank in ranks]):
        if time.monotonic() > deadline:
            failed = f"no end after {timeout_s} s"
        failed = failed or next((f"rank {r} exited {code}" for r, code in enumerate(codes) if code), "")
        time.sleep(0.02)
    failed = failed or next(
        (f"rank {r} exited {code}" for r, code in enumerate(rank.poll() for rank in ranks) if code), ""
    )
    for rank in ranks:
        rank.kill()
        rank.wait()
    return failed


def _serve(device: str) -> None:
    """Fork a process for each line of stdin; write its pid to OUT.pid and, when it has ended, its code to OUT.code."""
    if device == "cpu":  # a fork of a process that has looked at a GPU cannot use it
        for library in (
            "tests.distributed.tiny_run",
            "trainer.loop",
            "torch._dynamo",
        ):  # torch's optimizers load dynamo
            importlib.import_module(library)
    running: dict[int, str] = {}
    with open(0, "rb", buffering=0) as orders:
        while True:
            if select.select([orders], [], [], 0.02)[0]:
                if not (line := orders.readline()):
                    break
                order = json.loads(line)
                out = order.pop("out")
                if (pid := os.fork()) == 0:
                    return _run(out, **order)
                running[pid] = out
                _publish(f"{out}.pid", str(pid))
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with contextlib.suppress(FileNotFoundError):  # who asked for it is gone
                    _publish(f"{running.pop(ended[0])}.code", str(os.waitstatus_to_exitcode(ended[1])))
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _run(
    out: str,
    env: dict[str, str],
    module: str = "",
    argv: Sequence[str] = (),
    call: str = "",
    kwargs: Mapping[str, Any] | None = None,
    result: str = "",
) -> None:
    """A forked process: runs a module as `python -m` does, or writes to `result` what a function returns."""
    with Path(f"{out}.err").open("ab") as err, Path(os.devnull).open("r+b") as nothing:
        for number, file in enumerate((nothing, nothing if module else err, err)):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    if module:
        sys.argv = [module, *argv]
        sys.orig_argv = [sys.executable, "-m", module, *argv]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        name, _, function = call.partition(":")
        Path(result).write_text(json.dumps(getattr(importlib.import_module(name), function)(**(kwargs or {}))))


def _publish(path: str, text: str) -> None:
    Path(f"{path}.tmp").write_text(text)
    Path(f"{path}.tmp").rename(path)


if __name__ == "__main__":
    _serve(sys.argv[1])

"""Run a function on several real ranks (gloo, loopback) and get what each returned.

    losses = run_ranks(2, "tests.distributed.test_x:losses_of", tp=2)

starts two processes in which `losses_of(tp=2)` runs with RANK, WORLD_SIZE and LOCAL_RANK set. The function is named,
not pickled; arguments and results travel as JSON. Ranks on a CPU are forks of one process that has imported the
libraries, which saves each of them seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
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
    world_size: int, target: str, *, timeout_s: float = 240.0, device: str = "cpu", **kwargs: Any
) -> list[Any]:
    """What `target` ("module:function") returned on each rank, in rank order; `device` cpu or cuda.

    Raises:
        AssertionError: a rank failed or the time ran out; carries the ranks' stderr.
    """
    port, server = free_port(), _server(device)
    assert server.stdin is not None
    with tempfile.TemporaryDirectory() as tmp:
        outs = [str(Path(tmp) / str(rank)) for rank in range(world_size)]
        for rank, out in enumerate(outs):
            Path(f"{out}.err").touch()
            order = [rank_env(rank, world_size, port, device), target, kwargs, out]
            server.stdin.write(f"{json.dumps(order)}\n".encode())
        failed = _wait(outs, server, timeout_s)
        if failed:
            logs = "\n".join(f"--- rank {r}\n{Path(f'{out}.err').read_text()[-4000:]}" for r, out in enumerate(outs))
            raise AssertionError(f"{target} on {world_size} ranks: {failed}\n{logs}")
        return [json.loads(Path(f"{out}.json").read_text()) for out in outs]


@cache
def _server(device: str) -> subprocess.Popen[bytes]:
    """The process that forks ranks, and ends with this one, when its stdin does."""
    argv, env = [sys.executable, "-m", "tests.helpers.ranks", device], rank_env(0, 1, 0, device)
    return subprocess.Popen(argv, env=env, cwd=ROOT, stdin=subprocess.PIPE, bufsize=0)


def _wait(outs: list[str], server: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Empty when all ended well; the first failure ends the others, which would wait for it for ever."""
    deadline, failed, running = time.monotonic() + timeout_s, "", set(outs)
    while running:
        for rank, out in enumerate(outs):
            if out in running and (code := Path(f"{out}.code")).exists():
                running.remove(out)
                failed = failed or ("" if code.read_text() == "0" else f"rank {rank} exited {code.read_text()}")
        if time.monotonic() > deadline:
            failed = failed or f"no end after {timeout_s} s"
        assert server.poll() is None, "the process that forks ranks has ended"
        for out in running if failed else ():
            with contextlib.suppress(OSError, ValueError):  # not yet forked, or just ended
                os.kill(int(Path(f"{out}.pid").read_text()), signal.SIGKILL)
        time.sleep(0.02)
    return failed


def _serve(device: str) -> None:
    """Fork a rank for each line of stdin; write its pid to OUT.pid and, when it has ended, its code to OUT.code."""
    if device == "cpu":  # a fork of a process that has looked at a GPU cannot use it
        importlib.import_module("tests.distributed.tiny_run")
    running: dict[int, str] = {}
    with open(0, "rb", buffering=0) as orders:
        while True:
            if select.select([orders], [], [], 0.02)[0]:
                if not (line := orders.readline()):
                    break
                env, target, kwargs, out = json.loads(line)
                if (pid := os.fork()) == 0:
                    _run(env, target, kwargs, out)
                running[pid] = out
                _publish(f"{out}.pid", str(pid))
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with contextlib.suppress(FileNotFoundError):  # who asked for it is gone
                    _publish(f"{running.pop(ended[0])}.code", str(os.waitstatus_to_exitcode(ended[1])))
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _run(env: dict[str, str], target: str, kwargs: dict[str, Any], out: str) -> None:
    """A rank's process: writes what the function returns to OUT.json, what it prints to OUT.err. Does not return."""
    code = 1
    try:
        with Path(f"{out}.err").open("ab") as err, Path(os.devnull).open("rb") as nothing:
            for number, file in enumerate((nothing, err, err)):
                os.dup2(file.fileno(), number)
        os.environ.clear()
        os.environ.update(env)
        module, _, function = target.partition(":")
        result = getattr(importlib.import_module(module), function)(**kwargs)
        Path(f"{out}.json").write_text(json.dumps(result))
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _publish(path: str, text: str) -> None:
    Path(f"{path}.tmp").write_text(text)
    Path(f"{path}.tmp").rename(path)


if __name__ == "__main__":
    _serve(sys.argv[1])

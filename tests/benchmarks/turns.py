"""Turns of two processes that train, so that one of them works at a time. Standard library only.

A side calls `Pace.step` between two of its steps. It stops there until it is granted a number of steps, and reports the
time that they took when they are done. It holds everything meanwhile: nothing is built anew for a turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Pace:
    """The end of a side: connects to the address that the other end listens at."""

    def __init__(self, address: str) -> None:
        self._connection = Client(address)
        self._left = 0
        self._began: tuple[float, float] | None = None
        self.report: dict[str, Any] = {}  # goes with the times of the turn

    def step(self) -> None:
        """Return when the next step may begin; the process ends where no more is granted."""
        if self._left == 0:
            self._pause()
        self._left -= 1

    def _pause(self) -> None:
        if self._began is not None:
            wall, cpu = self._began
            self.report |= {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        self._connection.send_bytes(json.dumps(self.report).encode())
        self.report = {}
        try:
            self._left = int(self._connection.recv_bytes())
        except EOFError:
            self._left = 0
        if not self._left:
            sys.stdout.flush()
            os._exit(0)  # neither side is to save or validate
        self._began = time.perf_counter(), time.process_time()


class Side:
    """The other end: a process of this command, with the address as its last word. Its output goes to a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path, patience_s: float = 300.0) -> None:
        address = str(log.with_suffix(".socket"))
        self._listener = Listener(address, "AF_UNIX")
        self._log = log
        self._patience_s = patience_s
        with log.open("w") as out:
            self.process = subprocess.Popen([*command, address], cwd=ROOT, env=dict(env), stdout=out, stderr=out)
        self._connection: Connection[Any, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """Wait until the side stands before its first step; returns what it says of itself."""
        accepting: Any = self._listener
        accepting._listener._socket.settimeout(1.0)
        began = time.monotonic()
        while self._connection is None:
            try:
                self._connection = self._listener.accept()
            except TimeoutError:
                if self.process.poll() is not None or time.monotonic() - began > self._patience_s:
                    raise RuntimeError(self._failure()) from None
        return self._receive()

    def turn(self, steps: int) -> dict[str, Any]:
        """Let the side make some steps; returns its report with `seconds` and `cpu_s`."""
        assert self._connection is not None
        self._connection.send_bytes(str(steps).encode())
        return self._receive()

    def close(self) -> None:
        """End the side, whatever it does."""
        if self._connection is not None:
            self._connection.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.close()

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        try:
            if not self._connection.poll(self._patience_s):
                raise EOFError
            report: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise RuntimeError(self._failure()) from None
        return report

    def _failure(self) -> str:
        return f"{' '.join(map(str, self.process.args))}\n{self._log.read_text()[-3000:]}"  # type: ignore[arg-type]

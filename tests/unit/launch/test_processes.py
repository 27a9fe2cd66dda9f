"""Looking after processes: what a signal handler may ask while the main thread waits for a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from launch.processes import send
from tests.helpers.ranks import ROOT

HANDLER = """
import os, signal, subprocess, sys, time
from launch.processes import become_subreaper, descendants
become_subreaper()
command = subprocess.Popen(["sleep", "60"])
def handler(number, frame):
    assert descendants() == [command.pid]
    command.kill()
    time.sleep(0.3)
    assert descendants() == [], "a dead one is none"
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.3)
sys.exit(-command.wait())
"""


def test_a_command_that_dies_in_a_signal_handler_keeps_its_code() -> None:
    """It dies while the handler looks for its descendants."""
    assert subprocess.run([sys.executable, "-c", HANDLER], cwd=ROOT, timeout=300).returncode == signal.SIGKILL


def test_who_is_not_ours_to_signal_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(pid)

    monkeypatch.setattr(os, "kill", refuse)
    send(1, signal.SIGTERM)

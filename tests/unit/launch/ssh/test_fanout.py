"""A command on several hosts, and the tether that it runs on: real processes, with a shell in ssh's place."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.ssh.fanout import Host
from tests.helpers.http_server import wait_for
from tests.helpers.ranks import ROOT
from trainer.run.heartbeat import Heartbeat, write_heartbeat

TETHER = [sys.executable, "-m", "launch.ssh.tether"]
SAVES = 'trap "echo saved; exit 9" TERM; echo up; while :; do sleep 0.05; done'
TIMEOUT_S = 60


def everywhere(root: Path, **commands: list[str]) -> subprocess.Popen[str]:
    (root / "ssh.json").write_text(json.dumps(commands))
    argv = [sys.executable, "-m", "launch.ssh.fanout", str(root / "ssh.json")]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def tether(*argv: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*TETHER, *argv], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_each_host_says_has_its_name_in_front(tmp_path: Path) -> None:
    out, err = (done := everywhere(tmp_path, a=sh("echo 1; echo 2"), b=sh("echo 3 >&2"))).communicate(timeout=TIMEOUT_S)
    assert (done.returncode, out, err) == (0, "a: 1\na: 2\n", "b: 3\n")


def test_the_exit_code_is_a_commands_not_a_lost_connections(tmp_path: Path) -> None:
    process = everywhere(tmp_path, a=sh("exit 255"), b=sh("sleep 1; exit 7"))
    assert process.wait(TIMEOUT_S) == 7
    process = everywhere(tmp_path, a=sh("exit 255"), b=sh("exit 255"))
    assert process.wait(TIMEOUT_S) == 255


def test_a_lost_host_is_taken_back_while_another_lives(tmp_path: Path) -> None:
    first = f"if mkdir {tmp_path}/lost; then exit 255; fi; echo back; exit 0"
    process = everywhere(tmp_path, a=sh("sleep 7"), b=sh(first))
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (0, "b: back\n")


def test_a_host_that_failed_alone_is_taken_back_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.ssh.fanout.FAILED_S", 0.1)
    host = Host("b", sh("echo again; exit 1"))
    deadline = time.monotonic() + TIMEOUT_S
    while host.code() is None or time.monotonic() - (host.ended_at or 0) < 0.5:
        host.revive()
        time.sleep(0.02)
        assert time.monotonic() < deadline
    host.close()
    assert capfd.readouterr().out == "b: again\n" * 4


def test_a_stop_reaches_the_far_side_and_its_output_comes_back(tmp_path: Path) -> None:
    process = everywhere(tmp_path, a=[*TETHER, "--", *sh(SAVES)], b=[*TETHER, "--", *sh(SAVES)])
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"a: up\n", "b: up\n"}
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, sorted(out.splitlines())) == (9, ["a: saved", "b: saved"])


def test_a_tether_passes_on_words_and_exit_code() -> None:
    process = tether("--", *sh("echo out; echo err >&2; exit 5"))
    assert process.stdout is not None and process.stderr is not None
    assert (process.wait(TIMEOUT_S), process.stdout.read(), process.stderr.read()) == (5, "out\n", "err\n")
    assert tether("--", *sh("kill -9 $$")).wait(TIMEOUT_S) == 137


def test_a_tether_ends_its_command_and_orphans(tmp_path: Path) -> None:
    """They end with the connection, and the command may still save.

    Nobody reads any more: its output goes nowhere, and does not end it before it has saved.
    """
    script = f'sleep 500 & echo $! > {tmp_path}/orphan; trap "echo {"x" * 99999}; touch {tmp_path}/saved; exit" TERM; '
    process = tether("--", *sh(f"{script} echo up; while :; do sleep 0.05; done"))
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "up\n"
    orphan = int((tmp_path / "orphan").read_text())
    for end in (process.stdout, process.stderr, process.stdin):
        end.close()
    process.wait(TIMEOUT_S)
    assert (tmp_path / "saved").exists() and not is_running(orphan)


def test_a_tether_signals_the_ranks_which_end_their_launcher(tmp_path: Path) -> None:
    """The ranks alone get the signal: a launcher that gets it, too, gives its ranks less time than they may need."""
    rank = "trap 'touch saved; exit 143' TERM; echo up; while :; do sleep 0.05; done"
    script = (
        f'trap "touch told" TERM; cd {tmp_path}; sh -c "$0" & echo $! > rank; wait $!; code=$?; wait $!; exit $code'
    )
    process = tether(f"--ranks={tmp_path}", "--", "sh", "-c", script, rank)
    assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "up\n"
    wait_for(lambda: (tmp_path / "rank").exists() and (tmp_path / "rank").read_text().endswith("\n"), TIMEOUT_S)
    pid, now = int((tmp_path / "rank").read_text()), time.time()
    write_heartbeat(
        tmp_path / "heartbeats", Heartbeat(0, socket.gethostname(), pid, 1, now, 3, "step", now, None, None)
    )
    process.stdin.close()
    assert process.wait(TIMEOUT_S) == 143
    assert (tmp_path / "saved").exists() and not (tmp_path / "told").exists()


def test_a_tether_takes_silence_for_a_lost_connection() -> None:
    """A word shows that the connection lives."""
    process = tether("--silence=1", "--", *sh("sleep 500"))
    assert process.wait(TIMEOUT_S) == 255
    process = tether("--silence=20", "--", *sh("read nothing; sleep 1; exit 3"))
    assert process.stdin is not None
    process.stdin.write(".")
    process.stdin.flush()
    assert process.wait(TIMEOUT_S) == 3


def test_a_variable_that_ssh_did_not_bring_is_refused() -> None:
    process = tether("--needs=PATH,NOT_THERE_AT_ALL", "--", "true")
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert err.startswith("error: NOT_THERE_AT_ALL of cluster.forward did not come to ")
    assert "NOT_THERE_AT_ALL" not in os.environ


def test_a_tether_ends_on_sigterm() -> None:
    process = tether("--", *sh(SAVES))
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(TIMEOUT_S) == 9 and time.monotonic() - began < TIMEOUT_S

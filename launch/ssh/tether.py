"""Entry: `python -m launch.ssh.tether [--needs A,B] [--silence S] [--ranks DIR] -- COMMAND ...`.

ssh leaves what it started running when the connection ends, so that a stopped or lost start would go on beside the
next one. Here the command ends with its connection: when stdin ends, or, with --silence, brings nothing for S seconds
(a host that was cut off sees no end), it gets SIGTERM, GRACE_S seconds to save, and SIGKILL, its descendants too; with
--ranks the ranks alone get that SIGTERM, by their heartbeats in that run folder, as soon as there are some.
Exits with the command's own exit code, 128 + N where signal N ended it, as ssh itself with 255 where the connection was
lost. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

from launch.processes import become_subreaper, end_descendants, ranks_below, send
from trainer.run.exit_codes import USER_ERROR
from trainer.run.folder import RunFolder

LOST = 255  # what ssh itself says of a lost connection: launch.ssh.fanout connects again
GRACE_S = 60.0  # for a rank that saves before it ends


class Tether:
    """Runs one command for as long as somebody holds the other end of stdin."""

    def __init__(self, command: list[str], silence_s: float | None = None, run_dir: Path | None = None) -> None:
        self.command = command
        self.silence_s = silence_s
        self.run_dir = run_dir
        self.stopped = ""  # why
        self.lost = False
        self.heard = time.monotonic()

    def run(self) -> int:
        become_subreaper()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
        )
        assert process.stdout is not None and process.stderr is not None
        pumps = [Pump(process.stdout, 1), Pump(process.stderr, 2)]
        stdin = select.poll()
        stdin.register(0, select.POLLIN)
        while process.poll() is None and not self.stopped:
            self._listen(stdin)
        if self.stopped:
            with contextlib.suppress(OSError):  # nobody may hear it
                print(f"tether: {self.stopped}: stopping", file=sys.stderr, flush=True)
            self._tell(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        end_descendants(GRACE_S)
        for pump in pumps:
            pump.join(5)
        if self.lost:
            return LOST
        code = process.returncode if process.returncode is not None else -signal.SIGKILL
        return code if code >= 0 else 128 - code

    def _listen(self, stdin: select.poll) -> None:
        """Wait a moment for stdin; sets `stopped` when it has ended, or was silent for too long."""
        if stdin.poll(200):
            if not os.read(0, 4096):
                self.stopped = "the connection has ended"
            self.heard = time.monotonic()
        if self.silence_s is not None and time.monotonic() - self.heard > self.silence_s:
            self.lost = True
            self.stopped = f"nothing came over the connection for {self.silence_s:g} s"

    def _tell(self, group: int) -> None:
        """SIGTERM to the ranks, or to the command's whole group."""
        ranks = ranks_below(RunFolder(self.run_dir).heartbeats) if self.run_dir is not None else ()
        for pid in ranks:
            send(pid, signal.SIGTERM)
        if not ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number).name


class Pump(threading.Thread):
    """Copies a pipe to a file descriptor of ours.

    It goes on emptying the pipe when nobody reads our output any more: a full pipe would stop a rank that saves.
    """

    def __init__(self, pipe: IO[bytes], fd: int) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._fd = fd
        self.start()

    def run(self) -> None:
        read = True
        while chunk := os.read(self._pipe.fileno(), 65536):
            while chunk and read:
                try:
                    chunk = chunk[os.write(self._fd, chunk) :]
                except OSError:
                    read = False


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch.ssh.tether")
    parser.add_argument("--needs", default="", help="names of environment variables that ssh must have brought")
    parser.add_argument("--silence", type=float, help="seconds without a word on stdin after which it is lost")
    parser.add_argument("--ranks", type=Path, help="the run folder whose ranks are told to stop, not their launcher")
    parser.add_argument("command", nargs="+", help="-- and what to run")
    given = parser.parse_args()
    absent = [name for name in given.needs.split(",") if name and name not in os.environ]
    if absent:
        print(
            f"error: {', '.join(absent)} of cluster.forward did not come to {socket.gethostname()}: let its sshd take "
            f"it (AcceptEnv {' '.join(absent)} in sshd_config)",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    sys.exit(Tether(given.command, given.silence, given.ranks).run())


if __name__ == "__main__":
    main()

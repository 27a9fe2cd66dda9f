"""Entry: `python -m launch.ssh.fanout FILE`: runs a command on each of several hosts, which may come and go.

FILE is JSON: {host: the argv of its ssh}. What a host says is shown with its name in front; that of "", which is pdsh
and names the hosts itself, as it is. A host that is lost (ssh's
exit code 255) is tried again every RETRY_S seconds while another one lives: torchrun there joins the others, so that a
host that was cut off or started anew is taken back; so is, RETRIES times, one whose command failed while the others'
went on. The run is done as soon as one host's command ends with 0, and has failed when all have ended; then
`launch.supervise` starts it anew. SIGTERM, SIGINT or SIGUSR1 closes the connections' stdin: the tether on the other
side stops its command, and what that still says and its exit code come here.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

LOST = 255  # ssh's own exit code
RETRY_S = 5.0
FAILED_S = 45.0  # a host's own failure: the others have gone on without it for so long
RETRIES = 3  # after such failures, on one host: each return costs the others a start
BEAT_S = 10.0  # between two words to a host, whose launch.ssh.tether waits for them
LEAVE_S = 120.0  # for hosts whose launchers wait for one another, and for rank 0's last rows, at the end of a run
END_S = 150.0  # launch.ssh.tether takes 2 x 60 s at most


class Host:
    """One host's command, started as often as its connection is lost."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self._label = f"{name}: " if name else ""
        self._argv = argv
        self._failures = 0
        self.start()

    def revive(self) -> None:
        """Start again what was lost, or has failed alone: to be called while another host lives."""
        code = self.code()
        if code is None or self.ended_at is None:
            return
        for_s = time.monotonic() - self.ended_at
        if code == LOST and for_s > RETRY_S:
            self.start()
        elif code != LOST and for_s > FAILED_S and self._failures < RETRIES:
            self._failures += 1
            self.start()

    def start(self) -> None:
        pipe = subprocess.PIPE  # a group of its own: a signal to ours must not cut the connection
        self.process = subprocess.Popen(self._argv, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)
        self.ended_at: float | None = None
        pipes = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._shows = [threading.Thread(target=self._show, args=ends, daemon=True) for ends in pipes]
        for show in self._shows:
            show.start()

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        code = self.process.poll()
        if code is not None and self.ended_at is None:
            self.ended_at = time.monotonic()
        return code

    def beat(self) -> None:
        """A word, so that the other side knows the connection lives."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it ended, or was told to stop
            self.process.stdin.write(b".")
            self.process.stdin.flush()

    def stop(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Show the last output, and end what still runs here of the connection."""
        if self.code() is None:
            self.process.kill()
        for show in self._shows:
            show.join(5)

    def _show(self, source: IO[bytes], sink: IO[str]) -> None:
        for line in source:
            with contextlib.suppress(OSError):
                print(f"{self._label}{line.decode(errors='replace')}", end="", file=sink, flush=True)


class Everywhere:
    def __init__(self, commands: dict[str, list[str]]) -> None:
        self.stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._stop)
        self.hosts = [Host(name, argv) for name, argv in commands.items()]

    def run(self) -> int:
        """0 when a host's command has ended with 0; else the first exit code that is not a lost connection's."""
        beat_at = 0.0
        while not self.stopped.wait(0.2):
            codes = [host.code() for host in self.hosts]
            if 0 in codes or None not in codes:
                break
            for host in self.hosts:
                host.revive()
            if time.monotonic() > beat_at:
                beat_at = time.monotonic() + BEAT_S
                for host in self.hosts:
                    host.beat()
        done = 0 in [host.code() for host in self.hosts]
        if not done:
            return self._end(0.0)
        self._end(LEAVE_S)
        return 0

    def _end(self, patience_s: float) -> int:
        """Give the hosts `patience_s` seconds to end by themselves, then stop them."""
        deadline = time.monotonic() + patience_s
        while any(host.code() is None for host in self.hosts) and time.monotonic() < deadline:
            time.sleep(0.2)
        for host in self.hosts:
            host.stop()
        deadline = time.monotonic() + END_S
        while any(host.code() is None for host in self.hosts) and time.monotonic() < deadline:
            time.sleep(0.2)
        for host in self.hosts:
            host.close()
        codes = [host.code() or LOST for host in self.hosts]
        return next((code if code > 0 else 128 - code for code in codes if code != LOST), LOST)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped.set()


def main() -> None:
    sys.exit(Everywhere(json.loads(Path(sys.argv[1]).read_text())).run())


if __name__ == "__main__":
    main()

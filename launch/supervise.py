"""Entry: `python -m launch.supervise run.dir=runs/x max_restarts=3 -- COMMAND ...`, the one restarter.

The command is started again when it fails, as long as the run's checkpoints advance between failures. It ends with the
command's own exit code; exit code 2, a user's mistake, would only be made again and ends it at once. SIGINT and SIGTERM
go on to the command, which may then save and end; it is not restarted after them. What is seen is told on stderr and
in run.dir/supervise.jsonl. Linux only: it adopts the orphans of a dead launcher, which torchrun puts out of reach of a
process group's signals, so that no process of an old start can meet a new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

from conf.schema import run
from data_pipeline.config import UserError
from launch.config import SuperviseConfig
from trainer.run_folder import RunFolder

USER_ERROR = 2
TAIL_BYTES = 16384  # of a start's stderr, kept to tell why it failed
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


class Supervisor:
    """Runs one command until it succeeds, is stopped, or fails without getting anywhere."""

    def __init__(self, cfg: SuperviseConfig, command: list[str]) -> None:
        self.cfg, self.command = cfg, command
        self.root = Path(cfg.run.dir)
        self.root.mkdir(parents=True, exist_ok=True)
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def supervise(self) -> int:
        """Returns the exit code of the command's last start, 128 + N where signal N ended it.

        Raises:
            UserError: the command cannot be started, or what it left behind cannot be ended.
        """
        become_subreaper()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward)
        failures, first, step = 0, "", latest_step(self.root)
        while True:
            self._log("start", step=step)
            code, tail = self._run_once()
            end_descendants(self.cfg.grace_s)
            before, step = step, latest_step(self.root)
            self._log("exit", step=step, exit_code=code)
            if code == 0 or self._stop.is_set() or is_user_error(code, tail):
                return code
            if step > before:
                failures = 0
            failures += 1
            first = first if failures > 1 else f"exit code {code}: {cause(tail)}"
            if failures > self.cfg.max_restarts:
                self._log("give up", step=step, exit_code=code)
                why = f"{failures} failures after step {max(step, 0)} without a new checkpoint"
                print(f"error: {why} (max_restarts={self.cfg.max_restarts}); the first: {first}", file=sys.stderr)
                return code
            wait_s = min(self.cfg.backoff_s * 2 ** (failures - 1), self.cfg.max_backoff_s)
            self._log("restart", step=step, exit_code=code, wait_s=wait_s, failures=failures)
            if self._stop.wait(wait_s):
                return code

    def _run_once(self) -> tuple[int, str]:
        """Start the command and wait for its end: exit code, and the end of its stderr, which also goes to ours."""
        try:
            self._process = subprocess.Popen(self.command, stderr=subprocess.PIPE, process_group=0)
        except OSError as e:
            raise UserError(f"{self.command[0]} cannot be started: {e}") from None
        if self._stop.is_set():  # the signal came while there was nobody to tell
            self._forward(signal.SIGTERM, None)
        assert self._process.stderr is not None
        tail = Tee(self._process.stderr)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code, tail.text()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _log(self, event: str, *, step: int, exit_code: int | None = None, **more: float) -> None:
        """`step`: of the latest checkpoint, -1 where there is none."""
        body = {"time": time.time(), "event": event, "exit_code": exit_code, "step": step, **more}
        with (self.root / "supervise.jsonl").open("a") as f:
            f.write(json.dumps(body) + "\n")
        said = ", ".join(f"{k} {v}" for k, v in body.items() if k not in ("time", "event") and v is not None)
        print(f"supervise: {event} ({said})", file=sys.stderr, flush=True)


class Tee(threading.Thread):
    """Copies a pipe to our stderr and keeps its end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe, self._tail = pipe, b""
        self.start()

    def run(self) -> None:
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 65536):
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
                with contextlib.suppress(OSError):  # our stderr may be gone; the command must not stand still for that
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.buffer.flush()

    def text(self) -> str:
        self.join(1.0)  # a process left behind may still hold the other end
        return self._tail.decode(errors="replace")


def latest_step(root: Path) -> int:
    """The step of the run's latest checkpoint, -1 where it has none. Raises UserError where the pointer is damaged."""
    latest = RunFolder(root).latest()
    return int(latest.name.split(".")[0].removeprefix("step-")) if latest else -1


def is_user_error(code: int, stderr: str) -> bool:
    """Exit code 2, also where torchrun turned it into its own 1 and tells of it in its report."""
    root_cause = stderr.rpartition("Root Cause")[2] if "Root Cause" in stderr else ""
    return code == USER_ERROR or re.search(rf"exitcode\s*:\s*{USER_ERROR}\b", root_cause) is not None


def cause(stderr: str) -> str:
    """The first line that names an error, then the last three lines: one line of at most 800 characters."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", stderr) if line.strip(" =-\t")]
    named = r"(\w[\w.-]*: )?(error: |([A-Za-z_]\w*\.)*\w*(Error|Exception)\b)"  # a host may stand in front
    errors = [line for line in lines[:-3] if re.match(named, line)]
    return " | ".join(errors[:1] + lines[-3:])[:800] or "nothing on stderr"


def become_subreaper() -> None:
    """From here on orphaned descendants become our children, whatever session they are in."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants(grace_s: float) -> None:
    """Returns when every descendant is gone: SIGTERM, `grace_s` seconds, SIGKILL.

    Raises:
        UserError: one does not even end with SIGKILL (it hangs in the kernel), so that a restart would meet it.
    """
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + limit_s
        told: set[int] = set()
        while alive := descendants():
            for pid in set(alive) - told:
                send(pid, number)
                told.add(pid)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    raise UserError(
        f"processes {', '.join(map(str, alive))} of the failed start do not end with SIGKILL: not restarted"
    )


def descendants() -> list[int]:
    """Living descendants of this process; its own dead children are reaped."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    reap()
    found = list(children.get(os.getpid(), []))
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command, sys.argv = sys.argv[at + 1 :], sys.argv[:at]

    def supervise(cfg: SuperviseConfig) -> None:
        if not command:
            raise UserError("what to run is not given: end the line with -- COMMAND ...")
        sys.exit(Supervisor(cfg, command).supervise())

    run(("supervise", supervise))


if __name__ == "__main__":
    main()

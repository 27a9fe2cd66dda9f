"""Entry: `python -m launch.supervise run.dir=runs/x max_restarts=3 -- COMMAND ...`, the one restarter.

The command is started again when it fails, as long as the run's checkpoints advance between failures. It ends with the
command's own exit code; 2, a user's mistake, would only be made again and ends it at once, and so does 85, of a run
that saved and stopped because more time comes later. SIGUSR1, SIGTERM and SIGINT go on to the ranks, which may then
save and end; nothing is restarted after them. What is seen is told on stderr and in run.dir/supervise.jsonl. Linux
only: it adopts the orphans of a dead launcher, which torchrun puts out of reach of a process group's signals, so that
no process of an old start can meet a new one.
"""

from __future__ import annotations

import contextlib
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
from launch.processes import become_subreaper, end_descendants, ranks_below, send
from trainer.exit_codes import ALONE, HUNG, PREEMPTED, USER_ERROR
from trainer.redact import redact
from trainer.run_folder import RunFolder
from trainer.signals import CODES

TAIL_BYTES = 16384  # of a start's stderr, kept to tell why it failed


class Supervisor:
    """Runs one command until it succeeds, is stopped, or fails without getting anywhere."""

    def __init__(self, cfg: SuperviseConfig, command: list[str]) -> None:
        self.cfg, self.command = cfg, command
        self.root = Path(cfg.run.dir)
        self.folder = RunFolder(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        self._asked: list[int] = []  # the signals that came
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def supervise(self) -> int:
        """Returns the exit code of the command's last start (see `outcome`), 128 + N where signal N ended it.

        Raises:
            UserError: the command cannot be started, or what it left behind cannot be ended.
        """
        become_subreaper()
        for number in CODES:
            signal.signal(number, self._forward)
        failures, first, step = 0, "", latest_step(self.root)
        while True:
            self._log("start", step=step)
            generation = self.folder.newest_generation()
            code, tail = self._run_once()
            end_descendants(self.cfg.grace_s)
            before, step = step, latest_step(self.root)
            why = None if code == 0 else hang(self.folder, generation) or cause(tail)
            code = told(code, tail)
            self._log("exit", step=step, exit_code=code, cause=why)
            if code in (0, USER_ERROR, PREEMPTED) or self._asked:
                return outcome(code, self._asked)
            if step > before:
                failures = 0
            failures += 1
            first = first if failures > 1 else f"exit code {code}: {why}"
            if failures > self.cfg.max_restarts:
                self._log("give up", step=step, exit_code=code)
                what = f"{failures} failures after step {max(step, 0)} without a new checkpoint"
                print(f"error: {what} (max_restarts={self.cfg.max_restarts}); the first: {first}", file=sys.stderr)
                return code
            wait_s = min(self.cfg.backoff_s * 2 ** (failures - 1), self.cfg.max_backoff_s)
            self._log("restart", step=step, exit_code=code, wait_s=wait_s, failures=failures)
            if self._stop.wait(wait_s):
                return outcome(code, self._asked)

    def _run_once(self) -> tuple[int, str]:
        """Start the command and wait for its end: exit code, and the end of its stderr, which also goes to ours."""
        try:
            self._process = subprocess.Popen(self.command, stderr=subprocess.PIPE, process_group=0)
        except OSError as e:
            raise UserError(f"{self.command[0]} cannot be started: {e}") from None
        for number in tuple(self._asked):  # it came while there was nobody to tell
            self._forward(number, None)
        assert self._process.stderr is not None
        tail = Tee(self._process.stderr)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code, tail.text()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """To the ranks of this host, for launchers do what they like with it: torchrun dies of a SIGUSR1, and gives its
        workers 30 s for a checkpoint. Where there are none (yet, or under srun), and when asked again: to the command.
        """
        again = number in self._asked
        self._asked.append(number)
        self._stop.set()
        if self._process is None or self._process.returncode is not None:
            return
        ranks = ranks_below(self.folder.heartbeats)
        for pid in ranks:
            send(pid, number)
        if again or not ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _log(self, event: str, *, step: int, exit_code: int | None = None, **more: float | str | None) -> None:
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


def told(code: int, stderr: str) -> int:
    """A rank's exit code that says what to do, also where torchrun turned it into its own 1 and tells of it."""
    root_cause = stderr.rpartition("Root Cause")[2] if code == 1 and "Root Cause" in stderr else ""
    found = re.search(r"exitcode\s*:\s*(\d+)\b", root_cause)
    return int(found[1]) if found and int(found[1]) in (USER_ERROR, HUNG, ALONE, *CODES.values()) else code


def outcome(code: int, asked: list[int]) -> int:
    """How this process ends. Asked with SIGUSR1, whatever failed meanwhile goes on later, from the last checkpoint;
    asked with SIGTERM or SIGINT, a launcher's 1 is that signal's code, and so is the other's if it told that."""
    number = next((n for n in reversed(CODES) if n in asked), None)
    if number is None or code in (0, USER_ERROR):
        return code
    others = (1, CODES[signal.SIGTERM], CODES[signal.SIGINT])
    return CODES[number] if number == signal.SIGUSR1 or code in others else code


def hang(folder: RunFolder, before: int) -> str | None:
    """The first line of what the watch found in a start after the one numbered `before`; None: no hang."""
    newest = folder.newest_generation()
    try:
        with folder.hang_report(newest).open(encoding="utf-8", errors="replace") as f:
            return f.readline(800).strip() if newest > before else None
    except OSError:
        return None


def cause(stderr: str) -> str:
    """The first line that names an error or a stop, then the last three lines: one line of at most 800 characters.

    It goes into the run folder: what looks secret is cut out.
    """
    lines = [line.strip() for line in re.split(r"[\r\n]+", stderr) if line.strip(" =-\t")]
    named = r"(\w[\w.-]*: )?(error: |stopped by |([A-Za-z_]\w*\.)*\w*(Error|Exception)\b)"  # a host may stand in front
    errors = [line for line in lines[:-3] if re.match(named, line)]
    return redact(" | ".join(errors[:1] + lines[-3:]))[:800] or "nothing on stderr"


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

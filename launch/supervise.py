"""Entry: `python -m launch.supervise run.dir=runs/x max_restarts=3 -- COMMAND ...`, the one restarter.

The command is started again when it fails, as long as the run's checkpoints advance between failures. It ends with the
command's own exit code; 2, a user's mistake, would only be made again and ends it at once, and so do 130 and 143, of a
run that was told to end, and 85, of one that saved and stopped because more time comes later; that becomes 1 where
again and again nothing was saved. Whether a training is done, its last checkpoint says. SIGUSR1, SIGTERM and SIGINT go
on to the ranks, which may then save and end; nothing is restarted after them. What is seen is told on stderr and in
run.dir/supervise.jsonl. Linux only: it adopts the orphans of a dead launcher, which torchrun puts out of reach of a
process group's signals, so that no process of an old start can meet a new one.
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

from conf.errors import UserError, of_nature
from conf.frozen import peek
from conf.schema import run
from launch.config import SuperviseConfig
from launch.processes import become_subreaper, end_descendants, ranks_below, send
from trainer.run.exit_codes import ALONE, HUNG, PREEMPTED, USER_ERROR
from trainer.run.folder import RunFolder, step_of
from trainer.run.redact import redact
from trainer.run.signals import CODES

TAIL_BYTES = 16384  # of a start's stderr, kept to tell why it failed
AGAIN_S = 1.0  # between two SIGUSR1 to a launcher whose ranks have not begun
STOP = re.compile(
    rf"^(?:[\w.-]+: )*stopped by ({'|'.join(number.name for number in CODES)}) after step .*", re.MULTILINE
)
NOTHING_SAVED = "stopped without a checkpoint"  # an event: `idle` times in a row


class Supervisor:
    """Runs one command until it succeeds, is stopped, or fails without getting anywhere."""

    def __init__(self, cfg: SuperviseConfig, command: list[str]) -> None:
        self.cfg = cfg
        self.command = command
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
        at_first = step
        while True:
            self._log("start", step=step)
            generation = self.folder.newest_generation()
            code, tail = self._run_once()
            end_descendants(self.cfg.grace_s)
            before, step = step, latest_step(self.root)
            why = None if code == 0 else hang(self.folder, generation) or cause(tail)
            code, why = judged(rank_exit_code(code, tail), why, step, self._max_steps(generation), self.folder.ended())
            self._log("exit", step=step, exit_code=code, cause=why)
            if code in (0, USER_ERROR, *CODES.values()) or self._asked:
                return self._end(outcome(code, self._asked), at_first, step)
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
                return self._end(outcome(code, self._asked), at_first, step)

    def _max_steps(self, generation: int) -> int | None:
        """max_steps of the run that the command trained; None if it trained none: no start after `generation`."""
        if self.folder.newest_generation() <= generation:
            return None
        try:
            max_steps = peek(self.folder.config).get("max_steps")
        except (UserError, OSError):
            return None
        return max_steps if isinstance(max_steps, int) else None

    def _end(self, code: int, at_first: int, step: int) -> int:
        """The exit code, with 1 for an 85 that would requeue a job for ever: its time is too short for a checkpoint."""
        if code != PREEMPTED or step > at_first:
            return code
        idle = 1 + idle_stops(self.root / "supervise.jsonl", step)
        code = code if idle <= self.cfg.max_restarts else 1
        self._log(NOTHING_SAVED, step=step, exit_code=code, idle=idle)
        if code != PREEMPTED:
            print(
                f"error: stopped by SIGUSR1 {idle} times in a row after step {max(step, 0)} without a new checkpoint "
                f"(max_restarts={self.cfg.max_restarts}): that is too little time for one; give the job more "
                "(cluster.slurm.time, or a smaller signal_s)",
                file=sys.stderr,
            )
        return code

    def _run_once(self) -> tuple[int, str]:
        """Start the command and wait for its end: exit code, and the end of its stderr, which also goes to ours."""
        try:
            self._process = subprocess.Popen(self.command, stderr=subprocess.PIPE, process_group=0)
        except OSError as e:
            raise of_nature(e, f"{self.command[0]} cannot be started: {e}") from None
        for number in tuple(self._asked):  # it came while there was nobody to tell
            self._forward(number, None)
        assert self._process.stderr is not None
        tail = Tee(self._process.stderr)
        code = self._wait(self._process)
        self._process = None
        return code if code >= 0 else 128 - code, tail.text()

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the exit code. srun drops a SIGUSR1 that comes before its tasks run: repeat it until ranks run."""
        generation = self.folder.newest_generation()
        while True:
            try:
                return process.wait(AGAIN_S)
            except subprocess.TimeoutExpired:
                if signal.SIGUSR1 in self._asked and self.folder.newest_generation() <= generation:
                    self._tell(process, signal.SIGUSR1)

    def _tell(self, process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal to the ranks of this host. Launchers do not: torchrun dies of a SIGUSR1, and gives its workers
        30 s for a checkpoint. If there are no ranks (yet, or under srun), and the second time, the command gets it.
        """
        again = number in self._asked
        self._asked.append(number)
        self._stop.set()
        if self._process is None or self._process.returncode is not None:
            return
        for pid in (ranks := ranks_below(self.folder.heartbeats)):
            send(pid, number)
        if again or not ranks:
            self._tell(self._process, number)

    def _log(self, event: str, *, step: int, exit_code: int | None = None, **more: float | str | None) -> None:
        """Append a row to supervise.jsonl. `step`: of the latest checkpoint, -1 without one."""
        body = {"time": time.time(), "event": event, "exit_code": exit_code, "step": step, **more}
        with (self.root / "supervise.jsonl").open("a") as f:
            f.write(json.dumps(body) + "\n")
        said = ", ".join(f"{k} {v}" for k, v in body.items() if k not in ("time", "event") and v is not None)
        print(f"supervise: {event} ({said})", file=sys.stderr, flush=True)


class Tee(threading.Thread):
    """Copies a pipe to our stderr and keeps its end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._tail = b""
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
    """The step of the run's latest checkpoint, -1 without one."""
    latest = RunFolder(root).latest()
    return step_of(latest) if latest else -1


def idle_stops(events: Path, step: int) -> int:
    """The number of times in a row that SIGUSR1 stopped the run at `step` without a checkpoint in between."""
    idle = 0
    with events.open("rb") as f:
        for line in f:
            with contextlib.suppress(ValueError, AttributeError):  # half a line, of a host that went down
                row = json.loads(line)
                if row.get("event") == NOTHING_SAVED:
                    idle = int(row.get("idle", 0)) if row.get("step") == step else 0
    return idle


def judged(
    code: int, why: str | None, step: int, max_steps: int | None, ended: str | None = None
) -> tuple[int, str | None]:
    """Exit code and cause of a start of a training to `max_steps` whose latest checkpoint is of `step`.

    `ended`: why it ended itself before that. A launcher may fail when all is done, killing whom it thinks late, or end
    well where a node was lost.
    """
    if max_steps is None or code == USER_ERROR:
        return code, why
    if ended is not None or step >= max_steps:
        saved = f"the last of {max_steps} steps was saved" if step >= max_steps else f"it ended itself ({ended})"
        return 0, f"exit code {code} after {saved}: the run is done ({why})" if code else ended
    if code == 0:
        return 1, f"exit code 0, but the latest checkpoint is of step {max(step, 0)} of {max_steps}: not done"
    return code, why


def rank_exit_code(code: int, stderr: str) -> int:
    """A rank's exit code, also if the launcher returned another one and reports the rank's in its output.

    A rank that says that all have stopped and what is saved is believed: what killed it or its launcher after that
    changes nothing. torchrun makes 1 of a rank's code. srun ends with the highest of all ranks' codes, and kills those
    that are left of a failed step: the first rank that ended says why, by its own code, or by srun's where a signal
    killed it.
    """
    if code and (stop := STOP.search(stderr)):
        return CODES[signal.Signals[stop[1]]]
    ends = re.findall(r"^srun: error: \S+: tasks? [\d,-]+: (?:Exited with exit code (\d+)|\w)", stderr, re.MULTILINE)
    if code and ends:
        return int(ends[0] or code)
    root_cause = stderr.rpartition("Root Cause")[2] if code == 1 and "Root Cause" in stderr else ""
    match = re.search(r"exitcode\s*:\s*(\d+)\b", root_cause)
    return int(match[1]) if match and int(match[1]) in (USER_ERROR, HUNG, ALONE, *CODES.values()) else code


def outcome(code: int, asked: list[int]) -> int:
    """The exit code of this process.

    After SIGUSR1 the run goes on later from the last checkpoint, whatever failed meanwhile. After SIGTERM or SIGINT a
    launcher's 1, or the other signal's code, becomes the code of the signal that came."""
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
    lines = [line.strip() for line in re.split(r"[\r\n]+", stderr) if line.strip(" =-^~\t")]
    named = r"(\w[\w.-]*: )?(error: |stopped by |([A-Za-z_]\w*\.)*\w*(Error|Exception)\b)"  # a host may stand in front
    errors = [line for line in lines[:-3] if re.match(named, line)]
    stops = [stop[0] for line in lines if (stop := STOP.match(line))]
    return redact(" | ".join(stops[:1] or errors[:1] + lines[-3:]))[:800] or "nothing on stderr"


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command, sys.argv = sys.argv[split + 1 :], sys.argv[:split]

    def supervise(cfg: SuperviseConfig) -> None:
        if not command:
            raise UserError("what to run is not given: end the line with -- COMMAND ...")
        sys.exit(Supervisor(cfg, command).supervise())

    run(SuperviseConfig, supervise)


if __name__ == "__main__":
    main()

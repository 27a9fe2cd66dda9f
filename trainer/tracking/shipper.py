"""The thread between the journal and MLflow: tries, waits longer after each failure, tells of the first and of the end.

A server that is down, slow, full or hangs costs a warning: what waits is sent when it answers again, by the run's next
start, or by `python -m trainer.tracking sync`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from conf.errors import UserError
from trainer.config.pretrain import PretrainConfig
from trainer.run.exit_codes import PREEMPTED
from trainer.run.folder import RunFolder
from trainer.tracking.mlflow_sender import PATIENT_S, TIMEOUT_S, Sender, cause
from trainer.tracking.state import ShippingLock

PERIOD_S = 1.0  # between two looks at the journal
LONGEST_S = 30.0  # between two tries
CLOSE_S = 10.0  # what close() waits for a server that does not answer; six times that for one that is only slow
REGISTER_S = 1800.0  # and for the files of a model
PLOT_S, DRAW_S = 600.0, 60.0  # between two drawings of the curves; what one may take


class Status(Enum):
    """How a start of a run ended, in MLflow's words."""

    finished = "FINISHED"
    failed = "FAILED"
    stopped = "KILLED"  # somebody asked it to end
    preempted = "SCHEDULED"  # saved, and goes on when there is a place for it

    @classmethod
    def of(cls, error: BaseException | None) -> Status:
        """Of what left the `with`: an error's `code` is the exit code that it asks for (trainer/run/exit_codes.py)."""
        code = getattr(error, "code", None)
        if error is None or (isinstance(error, SystemExit) and not code):
            return cls.finished
        if isinstance(error, KeyboardInterrupt) or code in (130, 143):
            return cls.stopped
        return cls.preempted if code == PREEMPTED else cls.failed


class Shipper:
    """Sends the journal from where the run's last start left off, until it is closed."""

    def __init__(self, cfg: PretrainConfig, folder: RunFolder) -> None:
        """Raises UserError where tracking.json is damaged."""
        self._cfg, self._folder = cfg, folder
        self._sender = Sender(cfg, folder, warn)
        self._lock = ShippingLock(folder.root)
        self._known, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._failing, self._status = False, Status.finished
        self._drawn_at, self._drawn_last = time.monotonic(), False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def wait_run_id(self, timeout_s: float) -> str | None:
        self._known.wait(timeout_s)
        run_id: str | None = self._sender.state["run_id"]
        return run_id

    def close(self, status: Status) -> None:
        """The rest goes as far as the server answers; a second call does nothing."""
        if self._closing.is_set():
            return
        start, self._status = time.monotonic(), status
        self._closing.set()
        patience = REGISTER_S if self._cfg.tracking.register and status is Status.finished else 6 * CLOSE_S
        while self._thread.is_alive() and time.monotonic() - start < (CLOSE_S if self._failing else patience):
            self._thread.join(0.05)
        self._given_up.set()
        if self._thread.is_alive():
            warn(
                f"{self._sender.waiting()} rows of {self._folder.metrics} wait for {self._sender.uri}: the next start "
                f"sends them, or: python -m trainer.tracking sync run_dir={self._folder.root}"
            )

    def _run(self) -> None:
        failures = 0
        try:
            while not self._given_up.is_set():
                closing = self._closing.is_set()
                try:
                    self._once(closing)
                    if closing:
                        return
                    failures = 0
                except Exception as e:  # whatever it is, it must not end the training
                    failures += 1
                    if failures == 1:
                        warn(
                            f"{self._sender.uri} takes no metrics ({cause(e)}): training goes on, "
                            f"{self._sender.waiting()} rows wait in {self._folder.metrics}"
                        )
                if self._failing and not failures:
                    warn(f"{self._sender.uri} takes metrics again, nothing is lost")
                self._failing = failures > 0
                self._sender.allow(min(TIMEOUT_S * 2**failures, PATIENT_S))  # it may only be slow
                if not closing:
                    self._closing.wait(min(PERIOD_S * 2**failures, LONGEST_S))
                else:
                    self._given_up.wait(0.2)
        finally:
            self._lock.release()

    def _once(self, closing: bool) -> None:
        """Everything that is new. Raises whatever stands in the way."""
        if not self._lock.held:
            if not self._lock.take():
                raise RuntimeError("another process is sending this run")
            self._sender.state.read()
            self._sender.state.change(status="RUNNING")
        if closing:
            self._sender.state.change(status=self._status.value)  # for whoever sends it, should we not come to it
        if time.monotonic() - self._drawn_at > PLOT_S or (closing and not self._drawn_last):
            draw_curves(self._folder.root, self._cfg.run.name, warn)
            self._drawn_at, self._drawn_last = time.monotonic(), closing
        self._sender.send()
        self._known.set()
        if closing:
            self._sender.end()


def deliver(sender: Sender, timeout_s: float) -> Exception | None:
    """Send all that is left, here and now; None, or what stood in the way when nothing had gone for `timeout_s`.

    Raises:
        UserError: the journal is damaged.
    """
    failures, since, offset = 0, time.monotonic(), sender.state["offset"]
    while True:
        try:
            sender.send()
            sender.end()
            return None
        except UserError:
            raise
        except Exception as e:  # whatever MLflow or the network raises
            if sender.state["offset"] != offset:  # some of it went
                failures, since, offset = 0, time.monotonic(), sender.state["offset"]
            failures += 1
            if time.monotonic() - since > timeout_s:
                return e
        sender.allow(min(TIMEOUT_S * 2**failures, PATIENT_S, timeout_s))
        time.sleep(min(PERIOD_S * 2**failures, timeout_s / 10))


def draw_curves(root: Path, name: str, say: Callable[[str], None]) -> None:
    """plots/*.png from the journal, in a process of its own and of low priority: no work beside the training's."""
    argv = [sys.executable, "-m", "trainer.tracking.plots", str(root.resolve()), name]
    cwd = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=DRAW_S, stdin=subprocess.DEVNULL)
        what = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as e:
        what = [cause(e)]
    for line in what:
        say(f"{root}/plots are not drawn: {line}")


def warn(message: str) -> None:
    print(f"tracking: {message}", file=sys.stderr, flush=True)

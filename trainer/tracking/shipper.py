"""The thread between the journal and MLflow: it tries again after failures, and warns of the first and of the last.

A server that is down, slow, full or hangs costs a warning. The rows that wait are sent when it answers again, by the
run's next start, or by `python -m trainer.tracking sync`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from trainer.config.tracking import TrackingConfig
from trainer.run.exit_codes import PREEMPTED
from trainer.run.folder import RunFolder
from trainer.tracking.messages import cause, warn
from trainer.tracking.mlflow_sender import Sender
from trainer.tracking.refusals import refusal
from trainer.tracking.state import ShippingLock

PERIOD_S = 1.0  # between two looks at the journal
LONGEST_S = 30.0  # between two tries
CLOSE_S = 10.0  # that close() waits for a server that does not answer; six times that for one that is only slow
REGISTER_S = 1800.0  # that it waits for the files of a model
PLOT_S, DRAW_S = 600.0, 60.0  # between two drawings of the curves; the time limit of one


class Status(Enum):
    """The end of a start of a run, in MLflow's words."""

    finished = "FINISHED"
    failed = "FAILED"
    stopped = "KILLED"  # somebody asked it to end
    preempted = "SCHEDULED"  # saved, and goes on when there is a place for it

    @classmethod
    def of(cls, error: BaseException | None) -> Status:
        """The status for the error that ended the run; its `code` is the exit code (trainer/run/exit_codes.py)."""
        code = getattr(error, "code", None)
        if error is None or (isinstance(error, SystemExit) and not code):
            return cls.finished
        if isinstance(error, KeyboardInterrupt) or code in (130, 143):
            return cls.stopped
        return cls.preempted if code == PREEMPTED else cls.failed


class Shipper:
    """Sends the journal from the byte that the run's last start reached, until it is closed."""

    def __init__(self, cfg: TrackingConfig, name: str, params: Mapping[str, Any], folder: RunFolder) -> None:
        """`params`: the whole config, for MLflow's params. Raises UserError if tracking.json is damaged."""
        self._name = name
        self._folder = folder
        self._close_s = REGISTER_S if cfg.register else 6 * CLOSE_S
        self._sender = Sender(cfg, name, params, folder)
        self._lock = ShippingLock(folder.root)
        self._known = threading.Event()  # MLflow's id of the run is known
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._failing = False
        self._refusal: str | None = None  # what has to be done, where the failure does not pass by itself
        self._status = Status.finished
        self._drawn_at = time.monotonic()
        self._drawn_last = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def wait_run_id(self, timeout_s: float) -> str | None:
        """MLflow's id of the run; None if it is not known within `timeout_s`."""
        self._known.wait(timeout_s)
        return self._sender.state.sent.run_id

    def close(self, status: Status) -> None:
        """Send the rest as far as the server answers; a second call does nothing."""
        if self._closing.is_set():
            return
        start = time.monotonic()
        self._status = status
        self._closing.set()
        patience_s = self._close_s if status is Status.finished else 6 * CLOSE_S
        while self._thread.is_alive() and time.monotonic() - start < (CLOSE_S if self._failing else patience_s):
            self._thread.join(0.05)
        self._given_up.set()
        if self._thread.is_alive():
            first = f"{self._refusal}; then " if self._refusal else ""
            warn(
                f"{self._sender.waiting()} rows of {self._folder.metrics} wait for {self._sender.uri}: {first}the next "
                f"start sends them, or: python -m trainer.tracking sync run_dir={self._folder.root}"
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
                    failures, self._refusal = 0, None
                except Exception as e:  # whatever it is, it must not end the training
                    failures += 1
                    told, self._refusal = self._refusal, refusal(e)
                    if failures == 1:
                        warn(
                            f"{self._sender.uri} takes no metrics ({self._refusal or cause(e)}): training goes on, "
                            f"{self._sender.waiting()} rows wait in {self._folder.metrics}"
                        )
                    elif self._refusal not in (None, told):
                        warn(f"{self._sender.uri} takes none before something is done: {self._refusal}")
                if self._failing and not failures:
                    warn(f"{self._sender.uri} takes metrics again, nothing is lost")
                self._failing = failures > 0
                self._sender.be_patient(failures)  # it may only be slow
                if not closing:
                    self._closing.wait(backoff_s(failures))
                else:
                    self._given_up.wait(0.2)
        finally:
            self._lock.release()

    def _once(self, closing: bool) -> None:
        """Send everything that is new. Raises any error of MLflow, the network or the disk."""
        if not self._lock.held:
            if not self._lock.take():
                raise RuntimeError("another process is sending this run")
            self._sender.state.read()
            self._sender.state.change(status="RUNNING")
        if closing:
            self._sender.state.change(status=self._status.value)  # for the next sender, if this one does not reach it
        if time.monotonic() - self._drawn_at > PLOT_S or (closing and not self._drawn_last):
            draw_curves(self._folder.root, self._name)
            self._drawn_at = time.monotonic()
            self._drawn_last = closing
        self._sender.send()
        self._known.set()
        if closing:
            self._sender.end()


def backoff_s(failures: int) -> float:
    """Seconds before the next try, after so many failures in a row."""
    return min(PERIOD_S * 2.0 ** min(failures, 10), LONGEST_S)


def draw_curves(root: Path, name: str) -> None:
    """Draw plots/*.png from the journal, in a process of its own of low priority: no work beside the training's."""
    argv = [sys.executable, "-m", "trainer.tracking.plots", str(root.resolve()), name]
    cwd = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=DRAW_S, stdin=subprocess.DEVNULL)
        reasons = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as e:
        reasons = [cause(e)]
    for reason in reasons:
        warn(f"{root}/plots are not drawn: {reason}")

"""A run's numbers as the loop sees them: training thread -> queue -> metrics.jsonl -> MLflow (docs/tracking.md).

The training thread only fills a queue. A thread appends to the journal and fsyncs it, another sends the journal to
MLflow and remembers in tracking.json how far it came.

Entry: `python -m trainer.tracking sync run_dir=runs/x`: what is left of it goes now.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping

from conf.schema import run, thaw
from data_pipeline.config import Passing, UserError
from data_pipeline.plan import Plan
from trainer import tracking_config
from trainer.address import check_tracking
from trainer.config import PretrainConfig
from trainer.environment import store
from trainer.journal import JournalWriter, Row
from trainer.mixture_plot import MixturePlot
from trainer.run_folder import RunFolder
from trainer.sender import PATIENT_S, Sender, cause
from trainer.shipper import Shipper, Status, deliver, draw_curves, warn
from trainer.system_metrics import SystemMetrics
from trainer.tracking_config import SyncConfig
from trainer.tracking_state import ShippingLock


class Tracker:
    """One start's metrics on their way to the journal and to MLflow. Used on one rank."""

    def __init__(self, cfg: PretrainConfig, folder: RunFolder, generation: int, resumed_at: int) -> None:
        check_tracking(cfg.tracking)
        self._step: int | None = None  # the last that was logged
        self._writer = JournalWriter(folder.metrics)
        self.begin(generation, resumed_at)
        self._plot = MixturePlot(folder.mixture, cfg.run.name, cfg.max_steps)
        mlflow = cfg.tracking.name is tracking_config.Tracker.mlflow
        self._shipper = Shipper(cfg, folder) if mlflow else None
        self._environment = threading.Thread(target=_store, args=(folder, generation), name="environment", daemon=True)
        self._environment.start()
        self._told_at: int | None = None  # the step of the last system metrics: a step has them once
        period_s = cfg.tracking.system_s
        self._system = SystemMetrics(period_s, self._log_system) if period_s else None

    def begin(self, generation: int, resumed_at: int) -> None:
        """What is logged from here on is of this start; of earlier ones, the steps after `resumed_at` count no more."""
        self.generation = generation
        first = {"run/generation": float(generation)}  # which start did a step: for a store that cannot take back
        self._writer.put(Row(resumed_at, generation, time.time(), first, resumed_at=resumed_at))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Returns at once. Raises UserError where an earlier row could not be written."""
        self._writer.put(Row(step, self.generation, time.time(), {k: float(v) for k, v in metrics.items()}))
        self._step = step

    def show(self, plan: Plan, step: int) -> None:
        """Draw mixture.png anew, in the background: what is planned from `step` on has changed."""
        self._plot.show(plan, step)

    def flush(self) -> None:
        """Returns when everything logged is safe on disk. Raises UserError where it could not be written."""
        self._writer.flush()

    def wait_run_id(self, timeout_s: float) -> str | None:
        """MLflow's id of the run; None where it is not known in time, or never will be (tracking=none)."""
        return self._shipper.wait_run_id(timeout_s) if self._shipper else None

    def close(self, status: Status = Status.finished) -> None:
        """Journal complete, then MLflow as far as it answers (shipper.CLOSE_S); a second call does nothing."""
        if self._system:
            self._system.close()
        try:
            self._writer.close()
        finally:
            self._plot.close()
            self._environment.join(PATIENT_S)
            if self._shipper:
                self._shipper.close(status)

    def _log_system(self, metrics: dict[str, float]) -> None:
        if self._step not in (None, self._told_at):
            self._told_at = self._step
            self.log(self._told_at, metrics)


def _store(folder: RunFolder, generation: int) -> None:
    try:
        store(folder, generation)
    except Exception as e:  # what a run ran on is told, or a warning: it ends no training
        warn(f"{folder.environments} gets no file of this start ({cause(e)})")


def sync(cfg: SyncConfig) -> None:
    """Print {"rows_sent", "backlog", "run_id"}: lines of the journal that went now, and that did not.

    Raises:
        UserError: no run folder, or one that its own process is sending. Passing: the server took nothing for so long.
    """
    folder = RunFolder(cfg.run_dir)
    frozen = config_of(folder, cfg.uri)
    lock = ShippingLock(folder.root)
    if not lock.take():
        raise UserError(f"run_dir={cfg.run_dir}: the run is going on and sends its rows itself: let it, or wait for it")
    draw_curves(folder.root, frozen.run.name, warn)
    sender = Sender(frozen, folder, warn)
    before = sender.waiting()
    error = deliver(sender, cfg.timeout_s)
    left = sender.waiting()
    print(json.dumps({"rows_sent": before - left, "backlog": left, "run_id": sender.state["run_id"]}), flush=True)
    lock.release()
    if error is not None:
        raise Passing(f"{sender.uri} does not take what is left, in {cfg.timeout_s:g} s ({cause(error)}): try later")


def config_of(folder: RunFolder, uri: str | None) -> PretrainConfig:
    """The config that a run was started with, with MLflow as its tracker. Raises UserError where there is none."""
    if not folder.metrics.is_file():
        raise UserError(f"run_dir={folder.root} holds no {folder.metrics.name}: give the run.dir of a run")
    try:
        cfg = thaw(folder.config, PretrainConfig)
    except OSError as e:
        raise UserError(f"run_dir={folder.root}: its config cannot be read: {e}") from None
    except Exception as e:  # OmegaConf's many, for a file of another version or a damaged one
        raise UserError(f"{folder.config} is no config of this version ({cause(e)})") from None
    cfg.tracking.name = tracking_config.Tracker.mlflow
    cfg.tracking.uri = uri or cfg.tracking.uri
    check_tracking(cfg.tracking)
    return cfg


if __name__ == "__main__":
    run({"sync": ("sync", sync)})

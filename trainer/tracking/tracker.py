"""A run's numbers as the loop sees them: training thread -> queue -> metrics.jsonl -> MLflow (docs/tracking.md).

The training thread only fills a queue. One thread appends to the journal and fsyncs it; another sends the journal to
MLflow and remembers in tracking.json how far it came.

Entry: `python -m trainer.tracking sync run_dir=runs/x` sends the rest of a run now.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data_pipeline.files import publish
from data_pipeline.order.plan import Plan
from trainer.config.tracking import TrackerName, check_tracking
from trainer.config.train import TrainConfig
from trainer.run.environment import store
from trainer.run.folder import RunFolder
from trainer.run.journal import JournalWriter, Row
from trainer.tracking.messages import cause, warn
from trainer.tracking.mixture_plot import MixturePlot
from trainer.tracking.mlflow_sender import PATIENT_S
from trainer.tracking.shipper import Shipper, Status
from trainer.tracking.system_metrics import SystemMetrics


class Tracker:
    """Writes the metrics of one start to the journal and to MLflow. Used on one rank."""

    def __init__(self, cfg: TrainConfig, folder: RunFolder, generation: int, resumed_at: int) -> None:
        check_tracking(cfg.tracking)
        self._folder = folder
        self._writer = JournalWriter(folder.metrics)
        self.restart(generation, resumed_at)
        self._plot = MixturePlot(folder.mixture, cfg.run.name, cfg.max_steps)
        mlflow = cfg.tracking.name is TrackerName.mlflow
        self._shipper = Shipper(cfg.tracking, cfg.run.name, asdict(cfg), folder) if mlflow else None
        self._environment = threading.Thread(target=_store, args=(folder, generation), name="environment", daemon=True)
        self._environment.start()
        self._sampled: tuple[int, int] | None = None  # the last (step, generation) with system metrics: once each
        period_s = cfg.tracking.system_s
        self._system = SystemMetrics(period_s, self._log_system) if period_s else None

    def restart(self, generation: int, resumed_at: int) -> None:
        """Log to a new start from now on; steps after `resumed_at` of earlier ones are superseded."""
        self.generation = generation
        self._last: tuple[int, int] | None = None  # the newest (step, generation) that was logged
        metrics = {"run/generation": float(generation)}  # marks the start's steps, for a store that cannot take back
        self._writer.put(Row(resumed_at, generation, time.time(), metrics, resumed_at=resumed_at))

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[str] = ()) -> None:
        """Queue a row and return at once. Raises UserError if an earlier row could not be written.

        `samples` are texts, which also go into a file of their own, for MLflow.
        """
        numbers = {k: float(v) for k, v in metrics.items()}
        self._writer.put(Row(step, self.generation, time.time(), numbers, samples=tuple(samples)))
        if samples:
            self._keep(self._folder.samples / f"step-{step:08d}.txt", samples)
        if self._last is None or step > self._last[0]:  # a checkpoint's seconds come when later steps are done
            self._last = (step, self.generation)

    def show(self, plan: Plan, step: int) -> None:
        """Draw mixture.png again, in the background: the plan from `step` on has changed."""
        self._plot.show(plan, step)

    def flush(self) -> None:
        """Return when everything logged is safe on disk. Raises UserError if it could not be written."""
        self._writer.flush()

    def wait_run_id(self, timeout_s: float) -> str | None:
        """MLflow's id of the run; None if it is not known in time, or never will be (tracking=none)."""
        return self._shipper.wait_run_id(timeout_s) if self._shipper else None

    def close(self, status: Status = Status.finished) -> None:
        """Complete the journal, then MLflow as far as it answers (shipper.CLOSE_S); a second call does nothing."""
        if self._system:
            self._system.close()
        try:
            self._writer.close()
        finally:
            self._plot.close()
            self._environment.join(PATIENT_S)
            if self._shipper:
                self._shipper.close(status)

    def _keep(self, path: Path, samples: Sequence[str]) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            publish(path, "\n---\n".join(samples).encode())
        except OSError as e:
            warn(f"{path} is not written ({cause(e)}): the samples are in {self._folder.metrics} alone")

    def _log_system(self, metrics: dict[str, float]) -> None:
        last = self._last
        if last is not None and last != self._sampled:
            self._sampled = last
            self._writer.put(Row(*last, time.time(), metrics))


def _store(folder: RunFolder, generation: int) -> None:
    try:
        store(folder, generation)
    except Exception as e:  # the file about this start is written, or a warning: it ends no training
        warn(f"{folder.environments} gets no file of this start ({cause(e)})")

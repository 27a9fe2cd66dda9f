"""MLflow's door, and the way to it: training thread -> queue -> metrics.jsonl -> MLflow.

The training thread only fills a queue. A writer thread appends to the journal; a shipper thread sends the journal to
MLflow and remembers in tracking.json how far it came. A server that is down or hangs costs a warning: what waits is
sent when it answers again, or by the run's next start. A batch whose answer got lost is sent again; MLflow's stores
keep equal rows once. All starts of a run share one MLflow run, found again by a tag that the run folder made up.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.config import UserError
from data_pipeline.manifest import publish_json
from data_pipeline.plan import Plan
from trainer import config
from trainer.address import artifacts_of, check_tracking, tracking_uri
from trainer.config import PretrainConfig
from trainer.journal import JournalWriter, NewNumbers, Row
from trainer.mixture_plot import MixturePlot
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

STATE = "tracking.json"
TAG = "gradus.run"
PERIOD_S = 1.0  # between two looks at the journal
CLOSE_S = 10.0  # what close() waits for a server that does not answer; six times that for one that is only slow
BATCH = 1000  # MLflow's limit of metrics in a request
PARAMS, PARAM_CHARS = 100, 6000  # and of params in a request, and of characters in a param


class Tracker:
    """One start's metrics on their way to the journal and to MLflow. Used on one rank."""

    def __init__(self, cfg: PretrainConfig, folder: RunFolder, generation: int, resumed_at: int) -> None:
        check_tracking(cfg.tracking)
        self._writer = JournalWriter(folder.metrics)
        self.begin(generation, resumed_at)
        self._plot = MixturePlot(folder.mixture, cfg.run.name, cfg.max_steps)
        self._shipper = None if cfg.tracking.name is config.Tracker.none else _Shipper(cfg, folder)

    def begin(self, generation: int, resumed_at: int) -> None:
        """What is logged from here on is of this start; of earlier ones, the steps after `resumed_at` count no more."""
        self.generation = generation
        self._writer.put(Row(resumed_at, generation, time.time(), resumed_at=resumed_at))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Returns at once. Raises UserError where an earlier row could not be written."""
        self._writer.put(Row(step, self.generation, time.time(), {k: float(v) for k, v in metrics.items()}))

    def show(self, plan: Plan, step: int) -> None:
        """Draw mixture.png anew, in the background: what is planned from `step` on has changed."""
        self._plot.show(plan, step)

    def flush(self) -> None:
        """Returns when everything logged is safe on disk. Raises UserError where it could not be written."""
        self._writer.flush()

    def wait_run_id(self, timeout_s: float) -> str | None:
        """MLflow's id of the run; None where it is not known in time, or never will be (tracking=none)."""
        return self._shipper.wait_run_id(timeout_s) if self._shipper else None

    def close(self, *, failed: bool = False) -> None:
        """Journal complete, then MLflow as far as it answers (CLOSE_S); a second call does nothing."""
        try:
            self._writer.close()
        finally:
            self._plot.close()
            if self._shipper:
                self._shipper.close("FAILED" if failed else "FINISHED")


class _Shipper:
    """The thread that sends the journal to MLflow, from where the run's last start left off."""

    def __init__(self, cfg: PretrainConfig, folder: RunFolder) -> None:
        self._cfg, self._folder = cfg, folder
        self.uri = tracking_uri(cfg.tracking, folder.root)
        self._state_path = folder.root / STATE
        self._state = _load_state(self._state_path, self.uri, cfg.tracking.experiment)
        self._news = NewNumbers(folder.metrics)
        self._known, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._failing, self._status = False, "RUNNING"
        self._plot_stored: int | None = None  # when it was drawn
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # fail soon, the retries are ours;
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")  # MLflow reads these at each request
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training process calls nobody unasked
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def wait_run_id(self, timeout_s: float) -> str | None:
        self._known.wait(timeout_s)
        run_id: str | None = self._state["run_id"]
        return run_id

    def close(self, status: str) -> None:
        if self._closing.is_set():
            return
        start, self._status = time.monotonic(), status
        self._closing.set()
        while self._thread.is_alive() and time.monotonic() - start < (CLOSE_S if self._failing else 6 * CLOSE_S):
            self._thread.join(0.05)
        self._given_up.set()
        if self._thread.is_alive():
            _warn(f"{self._waiting()} rows of {self._folder.metrics} wait for {self.uri}: the next start sends them")

    def _run(self) -> None:
        client: MlflowClient | None = None
        failures = 0
        while not self._given_up.is_set():
            closing = self._closing.is_set()
            try:
                client = client or _alone(self.uri, self._connect)
                self._ship(client)
                self._store_plot(client)
                if closing:
                    client.set_terminated(self._state["run_id"], self._status)
                    return
                failures = 0
            except Exception as e:  # whatever it is, it must not end the training
                failures += 1
                if failures == 1:
                    _warn(
                        f"{self.uri} takes no metrics ({_cause(e)}): training goes on, "
                        f"{self._waiting()} rows wait in {self._folder.metrics}"
                    )
            if self._failing and not failures:
                _warn(f"{self.uri} takes metrics again, nothing is lost")
            self._failing = failures > 0
            if not closing:
                self._closing.wait(min(PERIOD_S * 2**failures, 30.0))
            else:
                self._given_up.wait(0.2)

    def _connect(self) -> MlflowClient:
        """Import MLflow, find or make the run. What the journal holds of an earlier address goes to the new one too."""
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # else it tells of each table it makes
        client = MlflowClient(self.uri)
        if self._state["run_id"] and not _has_run(client, self._state["run_id"]):
            _warn(f"{self.uri} has lost run {self._state['run_id']}: the whole journal is sent to a new one")
            self._save(run_id=None, offset=0, described=False)
        run_id = self._state["run_id"] or self._find_run(client)
        client.update_run(run_id, status="RUNNING")
        if self._folder.metrics.stat().st_size < self._state["offset"]:  # an older journal was put back: send it whole
            self._save(offset=0)
        self._save(run_id=run_id)
        if not self._state["described"]:
            self._describe(client, run_id)
        self._known.set()
        return client

    def _find_run(self, client: MlflowClient) -> str:
        name = self._cfg.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        place = artifacts_of(self.uri)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, place)
        tag = self._state["uuid"]
        found = client.search_runs([experiment_id], f"tags.`{TAG}` = '{tag}'", max_results=1)
        run = found[0] if found else client.create_run(experiment_id, run_name=self._cfg.run.name, tags={TAG: tag})
        return str(run.info.run_id)

    def _describe(self, client: MlflowClient, run_id: str) -> None:
        """The config, once: as params, cut to MLflow's length, and whole as an artifact where the server takes one."""
        from mlflow.entities import Param

        values = _flat(asdict(self._cfg))
        params = [Param(k, v if len(v) <= PARAM_CHARS else v[: PARAM_CHARS - 1] + "…") for k, v in values]
        for i in range(0, len(params), PARAMS):
            client.log_batch(run_id, params=params[i : i + PARAMS])
        self._store(client, self._folder.config)
        self._save(described=True)

    def _store(self, client: MlflowClient, path: Path) -> None:
        try:
            client.log_artifact(self._state["run_id"], str(path))
        except Exception as e:  # artifacts have their own storage and credentials; metrics do not wait for them
            _warn(f"{path} was not stored with the run ({_cause(e)}): it stays in the run folder")

    def _store_plot(self, client: MlflowClient) -> None:
        """mixture.png, each time that it was drawn anew; a server that is away raises before, in `_ship`."""
        drawn = self._folder.mixture.stat().st_mtime_ns if self._folder.mixture.exists() else None
        if drawn != self._plot_stored:
            self._plot_stored = drawn
            self._store(client, self._folder.mixture)

    def _ship(self, client: MlflowClient) -> None:
        """Send all that is complete in the journal. Raises what MLflow raises; the offset tells what has arrived."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        sent = end = self._state["offset"]
        for row, end in self._news.rows(sent):
            metrics += [Metric(k, v, round(row.time * 1000), row.step) for k, v in row.metrics.items()]
            if len(metrics) >= BATCH:
                self._send(client, metrics, end)
                metrics = []
        self._send(client, metrics, end)

    def _send(self, client: MlflowClient, metrics: list[Metric], offset: int) -> None:
        if offset == self._state["offset"]:
            return
        for i in range(0, len(metrics), BATCH):
            client.log_batch(self._state["run_id"], metrics=metrics[i : i + BATCH])
        self._save(offset=offset)

    def _waiting(self) -> int:
        with self._folder.metrics.open("rb") as f:
            f.seek(self._state["offset"])
            return sum(1 for _ in f)

    def _save(self, **changes: Any) -> None:
        self._state |= changes
        publish_json(self._state_path, self._state)


def _load_state(path: Path, uri: str, experiment: str) -> dict[str, Any]:
    """tracking.json; for another address than last time, nothing has been sent yet."""
    fresh = {"uri": uri, "experiment": experiment, "run_id": None, "offset": 0, "described": False}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if (state["uri"], state["experiment"]) != (uri, experiment):
            state = {"uuid": state["uuid"], **fresh}
        if set(state) != {"uuid", *fresh} or not isinstance(state["offset"], int):
            raise ValueError(f"keys {sorted(state)}")
    except FileNotFoundError:
        state = {"uuid": uuid.uuid4().hex, **fresh}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: damaged ({e!r}): delete it, the journal then goes to a new MLflow run") from None
    publish_json(path, state)  # before a run is made for it: the tag must outlive a kill
    return state


def _alone(uri: str, connect: Callable[[], MlflowClient]) -> MlflowClient:
    """MLflow makes a database file in steps that two processes at once would spoil."""
    if not uri.startswith("sqlite:///"):
        return connect()
    with Path(uri.removeprefix("sqlite:///") + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return connect()


def _has_run(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as e:
        if e.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _flat(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in body.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            value = value.value if isinstance(value, Enum) else value
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _warn(message: str) -> None:
    print(f"tracking: {message}", file=sys.stderr, flush=True)

"""Sends a run to MLflow, from the files of its run folder alone. Any error of MLflow is raised. The one user of mlflow.

A row is sent with its key, step and time; a batch whose answer got lost is sent again, and MLflow's stores keep equal
rows once. All starts of a run share one MLflow run, found again by a tag with the uuid of tracking.json.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files import read_json
from trainer.config.tracking import EXPERIMENT, TrackingConfig, artifacts_of, tracking_uri
from trainer.run.environment import owner
from trainer.run.folder import RunFolder, step_of
from trainer.run.journal import NewNumbers, read_rows, superseded
from trainer.tracking.facts import files_of, of_code, of_config, of_starts, read_figures
from trainer.tracking.messages import cause, warn
from trainer.tracking.refusals import Refused, refuse_deleted
from trainer.tracking.state import STATE, TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TAG, GENERATION, SUPERSEDED = "gradus.run", "gradus.generation", "gradus.superseded"
BATCH = 1000  # MLflow's limit of metrics in a request
PARAMS, TAG_CHARS = 100, 5000  # and of params in a request, and of characters in a tag
TIMEOUT_S, PATIENT_S, UPLOAD_S = 3.0, 60.0, 600.0  # of a request; after many failures; of a model's file
AGAIN_S = 60.0  # before a file that was not taken is offered again
MODEL = ("model.safetensors", "config.json", "tokenizer.json")  # of a run's last checkpoint
BOOKKEEPING = ("run/generation", "data/crc32")  # of the journal, for programs: no curves for a person
_OUR_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ  # else the user has said it


class Sender:
    """The client's end of one run. Used by one thread at a time."""

    def __init__(self, cfg: TrackingConfig, name: str, params: Mapping[str, Any], folder: RunFolder) -> None:
        """`name`: of the run; `params`: its whole config. Raises UserError if tracking.json is damaged."""
        self._cfg = cfg
        self._name = name
        self._params = params
        self._folder = folder
        self.uri = tracking_uri(cfg, folder.root)
        self.state = TrackingState(folder.root, self.uri, cfg.experiment or EXPERIMENT)
        self._news = NewNumbers(folder.metrics)
        self._client: MlflowClient | None = None
        self._new_start = True  # the journal has a start that the run's tags do not name
        self._refused_at: float | None = None  # time.monotonic of the last file that was not taken
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # fail soon, the retries are ours
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training process calls nobody unasked
        self._allow(TIMEOUT_S)

    def be_patient(self, failures: int, limit_s: float = PATIENT_S) -> None:
        """Double the time limit of a request with each failure in a row, to `limit_s`."""
        self._allow(min(TIMEOUT_S * 2.0 ** min(failures, 10), PATIENT_S, limit_s))

    def _allow(self, seconds: float) -> None:
        """Set the time limit of the next requests; MLflow reads it at each."""
        if _OUR_TIMEOUT:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(round(seconds))

    def send(self) -> None:
        """Send all that is new: rows, tags, files."""
        with self._connection() as client:
            self._send_rows(client)
            if self._new_start:
                self._tag_starts(client)
            self._store_files(client)

    def end(self) -> None:
        """Send the run's last status, and register the model of one that is finished."""
        with self._connection() as client:
            run_id, status, name = self._run_id, self.state.sent.status, self._cfg.register
            if status == "FINISHED" and name is not None and self.state.sent.registered is None:
                self._register(client, run_id, name)
            if status == "SCHEDULED":  # it goes on later: not terminated
                client.update_run(run_id, status=status)
            elif status != "RUNNING":
                client.set_terminated(run_id, status, max(self._times(), default=None))

    def waiting(self) -> int:
        """The number of lines of the journal that are not sent."""
        if not self._folder.metrics.exists():
            return 0
        with self._folder.metrics.open("rb") as f:
            f.seek(self.state.sent.offset)
            return sum(1 for line in f if line.endswith(b"\n"))

    @property
    def _run_id(self) -> str:
        assert self.state.sent.run_id is not None, "only after _connect"
        return self.state.sent.run_id

    @contextmanager
    def _connection(self) -> Iterator[MlflowClient]:
        """The client, connected anew after an error: the server may have come back without the run."""
        try:
            if self._client is None:
                self._client = _alone(self.uri, self._connect)
            yield self._client
        except Exception:
            self._client = None
            raise

    def _connect(self) -> MlflowClient:
        """Import MLflow, find or make the run. A new server gets the rows from before it, too."""
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # else it tells of each table it makes
        client = MlflowClient(self.uri, registry_uri=self.uri)
        run_id = self.state.sent.run_id
        if run_id and not _is_open(client, run_id):
            warn(f"{self.uri} has lost run {run_id}: the whole journal is sent to a new one")
            self.state.change(run_id=None, offset=0, described=False, stored={}, registered=None)
            run_id = None
        run_id = run_id or self._find_run(client)
        if self.state.sent.status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        if self._folder.metrics.stat().st_size < self.state.sent.offset:  # an older journal was put back: send it whole
            self.state.change(offset=0)
        self.state.change(run_id=run_id)
        if not self.state.sent.described:
            self._describe(client, run_id)
        return client

    def _find_run(self, client: MlflowClient) -> str:
        name = self._cfg.experiment or EXPERIMENT
        experiment = client.get_experiment_by_name(name)
        if experiment:
            refuse_deleted(experiment)
        folder = artifacts_of(self.uri)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, folder)
        tag = self.state.sent.uuid
        runs = client.search_runs([experiment_id], f"tags.`{TAG}` = '{tag}'", max_results=1)
        if runs:
            return str(runs[0].info.run_id)
        tags = {TAG: tag, "mlflow.user": owner(self._folder)}
        run = client.create_run(
            experiment_id,
            min(self._times(), default=None),
            tags,
            self._name,
        )
        return str(run.info.run_id)

    def _times(self) -> list[int]:
        """The times of the journal's rows, in ms."""
        return [round(row.time * 1000) for row, _ in read_rows(self._folder.metrics)]

    def _describe(self, client: MlflowClient, run_id: str) -> None:
        """Send what the config sets as params, once: a param is final."""
        self._send_params(client, run_id, of_config(self._params))
        self.state.change(described=True)

    def _send_params(self, client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        each = [Param(*param) for param in params.items()]
        for i in range(0, len(each), PARAMS):
            client.log_batch(run_id, params=each[i : i + PARAMS])

    def _send_rows(self, client: MlflowClient) -> None:
        """Send all complete lines of the journal; the offset follows what has arrived."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        end = start = self.state.sent.offset
        for row, end in self._news.rows(start):
            self._new_start = self._new_start or row.resumed_at is not None
            curves = [(k, v) for k, v in row.metrics.items() if k not in BOOKKEEPING]
            metrics += [Metric(k, v, round(row.time * 1000), row.step) for k, v in curves]
            if len(metrics) >= BATCH:
                self._send_metrics(client, metrics, end)
                metrics = []
        self._send_metrics(client, metrics, end)

    def _send_metrics(self, client: MlflowClient, metrics: list[Metric], offset: int) -> None:
        if offset != self.state.sent.offset:
            self._log(client, metrics)
            self.state.change(offset=offset)

    def _log(self, client: MlflowClient, metrics: list[Metric]) -> None:
        for i in range(0, len(metrics), BATCH):
            client.log_batch(self._run_id, metrics=metrics[i : i + BATCH])

    def _tag_starts(self, client: MlflowClient) -> None:
        """Say what each start changes, and which steps a later one did again: MLflow takes nothing back."""
        rows = [row for row, _ in read_rows(self._folder.metrics)]
        ranges: list[dict[str, int]] = superseded(rows)
        cut = 0
        while len(text := json.dumps([{"earlier": cut}] * (cut > 0) + ranges[cut:])) > TAG_CHARS:
            cut += 1
        newest = max((row.generation for row in rows), default=0)
        self._send_params(client, self._run_id, of_starts(self._folder, range(1, newest + 1)))
        client.set_tag(self._run_id, GENERATION, str(newest))
        client.set_tag(self._run_id, SUPERSEDED, text)
        self._new_start = False

    def _store_files(self, client: MlflowClient) -> None:
        """Store the files that have changed. They have their own storage and credentials, so rows do not wait for them:
        one that is refused costs a warning, and is offered again."""
        if self._refused_at is not None and time.monotonic() - self._refused_at < AGAIN_S:
            return
        files = {str(path.relative_to(self._folder.root)): path for path in files_of(self._folder) if path.exists()}
        stored = {name: when for name, when in self.state.sent.stored.items() if name in files}
        for name, path in files.items():
            try:
                if (when := path.stat().st_mtime_ns) == stored.get(name):
                    continue
                parent = Path(name).parent.as_posix()
                client.log_artifact(self._run_id, str(path), None if parent == "." else parent)
                if path.parent == self._folder.environments:
                    self._tag_code(client, path)
                if path.parent.parent == self._folder.evaluations and path.suffix == ".json":
                    self._send_figures(client, path)
            except FileNotFoundError:
                continue  # a checkpoint that has just been removed
            except Exception as e:
                if self._refused_at is None:
                    warn(f"{path} was not stored with the run ({cause(e)}): it stays in the run folder")
                self._refused_at = time.monotonic()
                return
            stored[name] = when
            self.state.change(stored=stored)
        self._refused_at = None

    def _tag_code(self, client: MlflowClient, path: Path) -> None:
        for tag, value in of_code(read_json(path, "the run goes on without it")).items():
            client.set_tag(self._run_id, tag, value)

    def _send_figures(self, client: MlflowClient, report: Path) -> None:
        """Send the figures of an evaluation as metrics of its checkpoint's step."""
        from mlflow.entities import Metric

        when, step = round(report.stat().st_mtime * 1000), step_of(report.parent)
        self._log(client, [Metric(key, value, when, step) for key, value in read_figures(report).items()])

    def _register(self, client: MlflowClient, run_id: str, name: str) -> None:
        """Register Hugging Face's files of the last checkpoint as a new version of the model `name`."""
        from mlflow.exceptions import MlflowException

        latest = self._folder.latest()
        paths = [latest / file for file in MODEL if (latest / file).is_file()] if latest else []
        if latest is None or latest / MODEL[0] not in paths:
            warn(f"{name} gets no new version: {latest} holds no {MODEL[0]}")
            return
        self._allow(UPLOAD_S)
        try:
            for path in paths:
                client.log_artifact(run_id, str(path), "model")
            try:
                client.create_registered_model(name)
            except MlflowException as e:
                if e.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")  # if an answer got lost
            made = versions[0] if versions else client.create_model_version(name, f"runs:/{run_id}/model", run_id)
            self.state.change(registered=f"{name}/{made.version}")
        finally:
            self._allow(TIMEOUT_S)


def _alone(uri: str, connect: Callable[[], MlflowClient]) -> MlflowClient:
    """Connect under a lock: MLflow makes a database file in steps that two processes at once would spoil."""
    if not uri.startswith("sqlite:///"):
        return connect()
    with Path(uri.removeprefix("sqlite:///") + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return connect()


def _is_open(client: MlflowClient, run_id: str) -> bool:
    """False if the server does not know the run. Raises Refused if it is in the trash."""
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(run_id).info
    except MlflowException as e:
        if e.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if info.lifecycle_stage == "deleted":
        refuse_deleted(client.get_experiment(info.experiment_id))
        raise Refused(
            f"run {run_id} is in MLflow's trash: mlflow runs restore --run-id {run_id}, or delete {STATE} in the run "
            "folder for a new run"
        )
    return True

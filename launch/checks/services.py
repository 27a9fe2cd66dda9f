"""Checks of the tracking server and of the data."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from conf.errors import UserError
from data_pipeline.config import DataConfig
from trainer.config.tracking import TrackerName, TrackingConfig, resolved, tracking_uri
from trainer.data.sources import open_sources
from trainer.diagnostics.check_result import CheckResult, fail, ok, warn

ANSWER_S = 5.0
MOST = 1024  # bytes of an answer
NAME = "tracking"


def tracking(cfg: TrackingConfig, run_dir: Path) -> CheckResult:
    if cfg.name is TrackerName.none:
        return ok(NAME, "none: metrics.jsonl in the run folder only")
    try:
        cfg, _ = resolved(cfg)
    except UserError as e:
        return fail(NAME, str(e), "or train with tracking=none")
    uri = tracking_uri(cfg, run_dir)
    if uri.startswith(("http://", "https://")):
        return server(uri)
    if uri.startswith("sqlite:///"):
        return database(Path(uri.removeprefix("sqlite:///")))
    return warn(NAME, f"{uri.partition('://')[0]}: not tried here", "start a short run with it first")


def server(uri: str) -> CheckResult:
    """Check MLflow's health and version pages. A run continues without the server and sends its rows later."""
    cure = "start the server, correct tracking.uri, or give tracking=none; a run trains on without the server"
    try:
        _ask(f"{uri.rstrip('/')}/health")
        theirs = _ask(f"{uri.rstrip('/')}/version")
    except urllib.error.HTTPError as e:
        login = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return fail(NAME, f"{uri} answers {e.code}", login if e.code in (401, 403) else cure)
    except (OSError, ValueError) as e:  # ValueError: no address, or what is no HTTP (http.client's are such)
        return fail(NAME, f"{uri} does not answer: {getattr(e, 'reason', e)}", cure)
    try:
        ours = version("mlflow")
    except PackageNotFoundError:
        ours = "none"
    text = f"{uri} answers, MLflow {theirs}, here {ours}"
    if theirs.split(".")[0] == ours.split(".")[0]:
        return ok(NAME, text)
    return warn(NAME, text, f"install the same major version on both: pip install 'mlflow=={theirs}'")


def _ask(url: str) -> str:
    """The first bytes of the answer at a URL. Raises OSError, ValueError."""
    with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
        return answer.read(MOST).decode("ascii", "replace").strip()


def database(path: Path) -> CheckResult:
    """Check that the SQLite file, or its folder, can be written."""
    above = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as e:
        return fail(NAME, f"{above} cannot be written: {e.strerror}", "give tracking.uri=sqlite:///FILE elsewhere")
    if not path.exists():
        return ok(NAME, f"{path}, to be made")
    try:
        connection = sqlite3.connect(f"file:{urllib.request.pathname2url(str(path))}?mode=rw", uri=True, timeout=1.0)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as e:
        return fail(NAME, f"{path}: {e}", "end what holds it, or give another tracking.uri")
    if not os.access(path, os.W_OK):
        return fail(NAME, f"{path} may not be written", "give tracking.uri=sqlite:///FILE elsewhere")
    return ok(NAME, f"{path} can be written")


def data(cfg: DataConfig) -> Iterator[CheckResult]:
    """The manifests of all sources."""
    try:
        sources = open_sources(cfg)
    except (UserError, OSError) as e:
        yield fail("data", str(e), "mend data.path, or mount it here")
        return
    for name, manifest in sources.train.items():
        val = "with" if name in sources.val else "without"
        yield ok("data", f"{name}: {manifest.tokens:,} tokens in {len(manifest.shards):,} shards, {val} validation")

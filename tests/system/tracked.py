"""Stand-ins for training processes that are tracked by the real MLflow, its server, and what both have counted."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.frozen import freeze
from conf.schema import load
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from tests.helpers.ranks import ROOT
from trainer.config.pretrain import PretrainConfig
from trainer.run.folder import RunFolder
from trainer.run.journal import read_rows
from trainer.tracking import shipper
from trainer.tracking.shipper import Status
from trainer.tracking.tracker import Tracker

needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None,
    reason="the tracking extra is not installed: pip install gradus[tracking]",
)


def loss_at(step: int) -> float:
    return 1.0 / (3.0 * step)


def config(root: Path, uri: str | None) -> PretrainConfig:
    overrides = ["experiment=demo", f"run.dir={root}", "data.path=none", f"tracking.uri={uri or 'null'}"]
    cfg: PretrainConfig = load(PretrainConfig, overrides)
    return cfg


def plan(weights: dict[str, int]) -> Plan:
    return Plan({name: [4000] for name in weights}, Ledger.start(8, 64, weights), lanes=4, seed=1)


def train(
    root: str,
    resumed_at: int,
    until: int | None,
    kill: bool,
    pause_s: float,
    uri: str | None,
    mixed: bool,
    status: str,
    close_s: float,
) -> None:
    """Stands for the training process; without `until` it logs on until a file named stop lies beside the run folder.
    `close_s`: that its end waits for a server that does not answer, and six times that for a slow one.

    Prints one JSON line of what it saw.
    """
    cfg, folder, stop = config(Path(root), uri), RunFolder(root), Path(root).parent / "stop"
    shipper.CLOSE_S = close_s
    generation = folder.take_generation()
    folder.config.write_text(freeze(cfg))
    tracker = Tracker(cfg, folder, generation, resumed_at)
    if mixed:
        tracker.show(plan({"books": 1, "web": 3}), resumed_at)
    if kill:
        tracker.wait_run_id(100)
    worst_s, step = 0.0, resumed_at
    while step < until if until is not None else not stop.exists():
        step += 1
        start = time.perf_counter()
        tracker.log(step, {"train/loss": loss_at(step), "speed/tokens_per_s": time.time()})
        worst_s = max(worst_s, time.perf_counter() - start)
        if step % 10 == 0:
            tracker.log(step, {"val/loss": 2 * loss_at(step)})
        time.sleep(pause_s)
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if mixed:
        tracker.show(plan({"books": 2, "web": 1}), step)
    start = time.perf_counter()
    tracker.close(Status[status])
    body = {"step": step, "worst_log_ms": 1e3 * worst_s, "close_s": time.perf_counter() - start}
    print(json.dumps({**body, "run_id": tracker.wait_run_id(0)}), flush=True)


def start_training(root: Path, resumed_at: int, until: int | None, **more: Any) -> subprocess.Popen[str]:
    """Its stderr is the file ROOT.err."""
    given = {"root": str(root), "resumed_at": resumed_at, "until": until, "kill": False, "pause_s": 0.001, "uri": None}
    argv = [
        sys.executable,
        "-m",
        "tests.system.tracked",
        json.dumps({"mixed": False, "status": "finished", "close_s": shipper.CLOSE_S, **given, **more}),
    ]
    root.parent.mkdir(exist_ok=True)
    with root.with_suffix(".err").open("a") as err:
        return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=err, text=True)


def end_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient  # seconds: not when tests are collected

    return MlflowClient(uri)


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))


def counted(client: Any, run_id: str) -> list[tuple[str, int, int]]:
    """(key, step, milliseconds) of every number that the server has of a run."""
    keys = client.get_run(run_id).data.metrics
    return sorted((key, m.step, m.timestamp) for key in keys for m in client.get_metric_history(run_id, key))


def logged(root: Path) -> list[tuple[str, int, int]]:
    """The same of all lines of the journal, without what is no curve for a person."""
    rows = [row for row, _ in read_rows(RunFolder(root).metrics)]
    keys = [(key, row) for row in rows for key in row.metrics if key not in ("run/generation", "data/crc32")]
    return sorted((key, row.step, round(row.time * 1000)) for key, row in keys)


def sync(root: Path, *overrides: str) -> tuple[int, dict[str, Any]]:
    """Exit code and printed line of `python -m trainer.tracking sync`."""
    argv = [sys.executable, "-m", "trainer.tracking", "sync", f"run_dir={root}", *overrides]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    argv += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"file://{folder}/artifacts",
    ]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(argv, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline and server.poll() is None, (folder / "server.log").read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return server
        except OSError:
            time.sleep(0.2)


def signal_group(server: subprocess.Popen[bytes], number: int) -> None:
    os.killpg(server.pid, number)
    if number == signal.SIGKILL:
        server.wait()


def offset(root: Path) -> int:
    try:
        return int(json.loads((root / "tracking.json").read_text())["offset"])
    except FileNotFoundError:
        return 0


def error_output(root: Path) -> str:
    return root.with_suffix(".err").read_text()


def said(root: Path, what: str) -> int:
    return error_output(root).count(what)


def is_away(root: Path) -> bool:
    """The server, as the training process last told."""
    return said(root, "takes no metrics") > said(root, "takes metrics again")


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))

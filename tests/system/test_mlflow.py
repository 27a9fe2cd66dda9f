"""A run and the real MLflow: one run over kills and starts, and nothing lost when its server dies or hangs."""

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

from conf.schema import freeze, load
from data_pipeline.ledger import Ledger
from data_pipeline.plan import Plan
from tests.ranks import ROOT, free_port
from trainer.address import tracking_uri
from trainer.config import PretrainConfig
from trainer.journal import read_journal
from trainer.mixture_plot import draw
from trainer.run_folder import RunFolder
from trainer.shipper import CLOSE_S
from trainer.tracking import Tracker

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None,
    reason="the tracking extra is not installed: pip install gradus[tracking]",
)


def loss_at(step: int) -> float:
    return 1.0 / (3.0 * step)


def config(root: Path, uri: str | None) -> PretrainConfig:
    overrides = ["experiment=demo", f"run.dir={root}", "data.path=none", f"tracking.uri={uri or 'null'}"]
    cfg: PretrainConfig = load("pretrain", overrides)
    return cfg


def plan(weights: dict[str, int]) -> Plan:
    return Plan({name: [4000] for name in weights}, Ledger.start(8, 64, weights), lanes=4, seed=1)


def train(
    root: str, resumed_at: int, until: int | None, kill: bool, pause_s: float, uri: str | None, mixed: bool
) -> None:
    """Stands for the training process; without `until` it logs on until a file named stop lies beside the run folder.

    Prints one JSON line of what it saw.
    """
    cfg, folder, stop = config(Path(root), uri), RunFolder(root), Path(root).parent / "stop"
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
    tracker.close()
    body = {"step": step, "worst_log_ms": 1e3 * worst_s, "close_s": time.perf_counter() - start}
    print(json.dumps({**body, "run_id": tracker.wait_run_id(0)}), flush=True)


def start_training(root: Path, resumed_at: int, until: int | None, **more: Any) -> subprocess.Popen[str]:
    """Its stderr is the file ROOT.err."""
    given = {"root": str(root), "resumed_at": resumed_at, "until": until, "kill": False, "pause_s": 0.001, "uri": None}
    argv = [sys.executable, "-m", "tests.system.test_mlflow", json.dumps({"mixed": False, **given, **more})]
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


def test_one_mlflow_run_serves_all_starts_and_has_each_row_once(tmp_path: Path) -> None:
    """Killed at step 600 with some part sent, resumed from 400; beside it another run in the same new database."""
    root, other = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    beside = start_training(other, 0, 300)
    killed = start_training(root, 0, 600, kill=True, pause_s=0.005)
    assert killed.wait(200) == -signal.SIGKILL
    first_id = json.loads((root / "tracking.json").read_text())["run_id"]
    beside_id = end_of(beside)["run_id"]
    done = end_of(start_training(root, 400, 1000, mixed=True))
    assert done["run_id"] == first_id != beside_id

    client = client_of(tracking_uri(config(root, None).tracking, root))
    expected = [(step, loss_at(step)) for step in range(1, 1001)]
    assert history(client, first_id, "train/loss") == expected
    assert history(client, first_id, "val/loss") == [(s, 2 * v) for s, v in expected if s % 10 == 0]
    assert {step for step, _ in history(client, first_id, "speed/tokens_per_s")} == set(range(1, 1001))
    assert history(client, beside_id, "train/loss") == expected[:300]
    assert [(r.step, r.metrics["train/loss"]) for r in read_journal(RunFolder(root).metrics)] == expected

    run = client.get_run(first_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params["model.n_layer"], run.data.params["tracking.name"]) == ("4", "mlflow")
    stored = client.download_artifacts(first_id, "config.yaml", str(tmp_path))
    assert Path(stored).read_text() == (root / "config.yaml").read_text()
    assert len(client.search_runs([run.info.experiment_id])) == 2
    picture = Path(client.download_artifacts(first_id, "mixture.png", str(tmp_path))).read_bytes()
    assert picture == (root / "mixture.png").read_bytes()
    cfg = config(root, None)
    assert picture == draw(plan({"books": 2, "web": 1}), 1000, cfg.max_steps, cfg.run.name)  # the last that was shown


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


def test_dead_server_costs_one_warning_and_a_bounded_close(tmp_path: Path) -> None:
    root, uri = tmp_path / "run", "http://127.0.0.1:9"  # the discard port: refused at once
    training = start_training(root, 0, None, uri=uri)
    wait_for(lambda: is_away(root))
    (tmp_path / "stop").touch()
    done = end_of(training)
    assert done["close_s"] < CLOSE_S + 5
    assert said(root, "takes no metrics") == 1
    assert f"rows of {RunFolder(root).metrics} wait for {uri}: the next start sends them" in error_output(root)
    rows = read_journal(RunFolder(root).metrics)
    assert [(r.step, r.metrics["train/loss"]) for r in rows] == [(s, loss_at(s)) for s in range(1, done["step"] + 1)]
    assert offset(root) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_when_the_server_is_killed_hangs_or_stays_away(tmp_path: Path) -> None:
    root, port = tmp_path / "run", free_port()
    uri = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path, port)
    try:
        training = start_training(root, 0, None, pause_s=0.01, uri=uri)
        wait_for(lambda: offset(root) > 20_000)
        signal_group(server, signal.SIGKILL)  # killed in the middle of logging
        wait_for(lambda: is_away(root))
        server = start_server(tmp_path, port)
        wait_for(lambda: not is_away(root))
        signal_group(server, signal.SIGSTOP)  # hangs: takes connections, never answers
        wait_for(lambda: is_away(root))
        signal_group(server, signal.SIGCONT)
        wait_for(lambda: not is_away(root))
        signal_group(server, signal.SIGSTOP)  # and hangs until after the end
        wait_for(lambda: is_away(root))
        (tmp_path / "stop").touch()
        done = end_of(training)
        assert said(root, "the next start sends them") == 1
        print(json.dumps(done))
        assert done["worst_log_ms"] < 250  # idle it is under 5; a call that waited for the server would take 3,000
        assert done["close_s"] < CLOSE_S + 5
        signal_group(server, signal.SIGKILL)
        server = start_server(tmp_path, port)
        again = end_of(start_training(root, done["step"], done["step"], uri=uri))
        assert again["run_id"] == done["run_id"]
        client, last = client_of(uri), done["step"]
        assert history(client, done["run_id"], "train/loss") == [(s, loss_at(s)) for s in range(1, last + 1)]
        assert len(history(client, done["run_id"], "speed/tokens_per_s")) == last
        assert len(history(client, done["run_id"], "val/loss")) == last // 10
        assert client.get_run(done["run_id"]).info.status == "FINISHED"
    finally:
        signal_group(server, signal.SIGKILL)


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

"""A run and the real MLflow: one run over kills and starts, and nothing lost when its server dies or hangs."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.helpers.ranks import free_port
from tests.system.tracked import (
    client_of,
    config,
    counted,
    end_of,
    error_output,
    history,
    is_away,
    logged,
    loss_at,
    needs_mlflow,
    offset,
    plan,
    said,
    signal_group,
    start_server,
    start_training,
    sync,
    wait_for,
)
from trainer.config.tracking import tracking_uri
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal, read_rows
from trainer.tracking.mixture_plot import draw
from trainer.tracking.shipper import CLOSE_S

pytestmark = needs_mlflow


def test_one_mlflow_run_serves_all_starts_and_has_each_row_once(tmp_path: Path) -> None:
    """Killed at step 600 with some part sent, resumed from 400; beside it another run in the same new database."""
    root, other = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    beside = start_training(other, 0, 300, status="preempted", close_s=30)  # all is sent on a slow machine too
    killed = start_training(root, 0, 600, kill=True, pause_s=0.005)
    assert killed.wait(200) == -signal.SIGKILL
    first_id = json.loads((root / "tracking.json").read_text())["run_id"]
    beside_id = end_of(beside)["run_id"]
    done = end_of(start_training(root, 400, 1000, mixed=True, close_s=30))
    assert done["run_id"] == first_id != beside_id

    client = client_of(tracking_uri(config(root, None).tracking, root))
    expected = [(step, loss_at(step)) for step in range(1, 1001)]
    assert history(client, first_id, "train/loss") == expected
    assert history(client, first_id, "val/loss") == [(s, 2 * v) for s, v in expected if s % 10 == 0]
    assert {step for step, _ in history(client, first_id, "speed/tokens_per_s")} == set(range(1, 1001))
    assert history(client, beside_id, "train/loss") == expected[:300]
    assert [(r.step, r.metrics["train/loss"]) for r in read_journal(RunFolder(root).metrics)] == expected

    at_server = counted(client, first_id)
    assert len(at_server) == len(set(at_server)) and set(at_server) <= set(logged(root))

    run = client.get_run(first_id)
    times = [round(row.time * 1000) for row, _ in read_rows(RunFolder(root).metrics)]
    assert (run.info.start_time, run.info.end_time) == (min(times), max(times))
    assert run.data.tags["mlflow.user"] == root.owner()
    assert "tracking.uri" not in run.data.params and "null" not in run.data.params.values()
    assert run.data.tags["gradus.generation"] == "2"
    reached = max(row.step for row, _ in read_rows(RunFolder(root).metrics) if row.generation == 1)
    assert 500 < reached <= 600  # the kill takes what the queue still holds
    assert json.loads(run.data.tags["gradus.superseded"]) == [{"generation": 1, "from_step": 401, "to_step": reached}]
    beside_run = client.get_run(beside_id)
    assert (beside_run.info.status, beside_run.data.tags["gradus.superseded"]) == ("SCHEDULED", "[]")
    assert run.info.status == "FINISHED"
    assert (run.data.params["model.n_layer"], run.data.params["tracking.name"]) == ("4", "mlflow")
    stored = client.download_artifacts(first_id, "config.yaml", str(tmp_path))
    assert Path(stored).read_text() == (root / "config.yaml").read_text()
    assert len(client.search_runs([run.info.experiment_id])) == 2
    picture = Path(client.download_artifacts(first_id, "mixture.png", str(tmp_path))).read_bytes()
    assert picture == (root / "mixture.png").read_bytes()
    cfg = config(root, None)
    assert picture == draw(plan({"books": 2, "web": 1}), 1000, cfg.max_steps, cfg.run.name)  # the last that was shown


def test_a_run_without_tracking_is_sent_as_it_was(tmp_path: Path) -> None:
    """Started, ended and finished when its files say, in the hands of its owner, without curves for programs."""
    root, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copytree(Path(__file__).parents[1] / "data" / "before" / "run", root)
    rows = [row for row, _ in read_rows(RunFolder(root).metrics)]
    code, told = sync(root, f"uri={uri}")
    assert (code, told["backlog"]) == (0, 0)
    client = client_of(uri)
    run = client.get_run(told["run_id"])
    assert run.info.status == "FINISHED"
    assert (run.info.start_time, run.info.end_time) == (round(rows[0].time * 1000), round(rows[-1].time * 1000))
    assert run.data.tags["mlflow.user"] == root.owner()
    assert set(run.data.metrics) == {key for row in rows for key in row.metrics} - {"run/generation", "data/crc32"}
    assert "null" not in run.data.params.values()

    (root / "checkpoints" / "latest").unlink()  # as it was before its last checkpoint
    shutil.rmtree(root / "checkpoints")
    (root / "tracking.json").unlink()
    assert client.get_run(sync(root, f"uri={uri}")[1]["run_id"]).info.status == "KILLED"


def test_figures_of_an_evaluation_are_sent_later(tmp_path: Path) -> None:
    """At the step of their checkpoint; sent again, they are there once."""
    root, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copytree(Path(__file__).parents[1] / "data" / "before" / "run", root)
    assert sync(root, f"uri={uri}")[0] == 0
    report = root / "evaluations" / "step-00000007.gen-0001-0a1b2c3d" / "report-01234567.json"
    report.parent.mkdir(parents=True)
    body = {"n": 4, "acc": 0.75, "acc_stderr": None, "ppl": 9.5, "shots": 2, "sha256": "of some files not known"}
    report.write_text(json.dumps({"results": {"dir/my task.yaml": body}, "settings": {"shots": 2}}))
    for _ in range(2):
        code, told = sync(root, f"uri={uri}")
        assert code == 0
        (root / "tracking.json").write_text(
            json.dumps({**json.loads((root / "tracking.json").read_text()), "stored": {}})  # as if killed in between
        )
    client, run_id = client_of(uri), told["run_id"]
    found = {
        key: history(client, run_id, f"task/my_task/2-shot/{key}") for key in ("n", "acc", "ppl", "shots", "acc_stderr")
    }
    assert found == {"n": [(7, 4.0)], "acc": [(7, 0.75)], "ppl": [(7, 9.5)], "shots": [], "acc_stderr": []}
    stored = client.download_artifacts(run_id, str(report.relative_to(root)), str(tmp_path))
    assert Path(stored).read_bytes() == report.read_bytes()


@pytest.mark.slow
def test_what_lies_in_mlflows_trash_is_named_with_its_cure(tmp_path: Path) -> None:
    """And taken on when it has been restored, by the same process."""
    root = tmp_path / "runs" / "a"
    training = start_training(root, 0, None, pause_s=0.01)
    wait_for(lambda: offset(root) > 5_000)
    run_id = json.loads((root / "tracking.json").read_text())["run_id"]
    client = client_of(tracking_uri(config(root, None).tracking, root))
    client.delete_run(run_id)
    wait_for(lambda: said(root, f"mlflow runs restore --run-id {run_id}") == 1)
    client.restore_run(run_id)
    wait_for(lambda: not is_away(root))
    experiment = client.get_run(run_id).info.experiment_id
    client.delete_experiment(experiment)
    cure = f"mlflow experiments restore --experiment-id {experiment}"
    wait_for(lambda: said(root, cure) == 1)
    (root.parent / "stop").touch()
    end_of(training)
    assert said(root, cure) == 2, "also where it says what waits"
    code, told = sync(root)
    assert code == 2 and told["backlog"] > 0
    client.restore_experiment(experiment)
    client.restore_run(run_id)  # the trash took it with the experiment
    assert sync(root)[0] == 0
    assert counted(client, run_id) == logged(root)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_server_that_comes_back_empty_gets_the_whole_run(tmp_path: Path) -> None:
    root, port = tmp_path / "run", free_port()
    uri = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path, port)
    try:
        training = start_training(root, 0, None, pause_s=0.01, uri=uri)
        wait_for(lambda: offset(root) > 5_000)
        first = json.loads((root / "tracking.json").read_text())["run_id"]
        signal_group(server, signal.SIGKILL)
        for path in tmp_path.glob("server.db*"):
            path.unlink()
        server = start_server(tmp_path, port)
        wait_for(lambda: said(root, f"has lost run {first}: the whole journal is sent to a new one") == 1)
        wait_for(lambda: not is_away(root))
        (tmp_path / "stop").touch()
        done = end_of(training)
        assert done["run_id"] != first
        assert counted(client_of(uri), done["run_id"]) == logged(root)
    finally:
        signal_group(server, signal.SIGKILL)


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
def test_nothing_is_lost_when_the_server_dies_or_hangs(tmp_path: Path) -> None:
    """The server is killed, hangs, and stays away past the end of the run; sync sends the rest."""
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
        assert said(root, "the next start sends them, or: python -m trainer.tracking sync") == 1
        print(json.dumps(done))
        assert done["worst_log_ms"] < 1000  # idle it is under 5; a call that waited for the server would take 3,000
        assert done["close_s"] < CLOSE_S + 5
        code, told = sync(root, "timeout_s=6")  # it hangs still
        assert (code, told["rows_sent"]) == (1, 0) and told["backlog"] > 0
        signal_group(server, signal.SIGKILL)
        server = start_server(tmp_path, port)
        assert sync(root) == (0, {"rows_sent": told["backlog"], "backlog": 0, "run_id": done["run_id"]})
        assert sync(root) == (0, {"rows_sent": 0, "backlog": 0, "run_id": done["run_id"]})
        client, last = client_of(uri), done["step"]
        assert counted(client, done["run_id"]) == logged(root)
        assert len(set(logged(root))) == len(logged(root)) > 2 * last
        assert history(client, done["run_id"], "train/loss") == [(s, loss_at(s)) for s in range(1, last + 1)]
        run = client.get_run(done["run_id"])
        assert (run.info.status, run.data.tags["gradus.superseded"]) == ("FINISHED", "[]")
        for name in ("config.yaml", "plots/loss.png", "environment/0001.json"):
            stored = client.download_artifacts(done["run_id"], name, str(tmp_path))
            assert Path(stored).read_bytes() == (root / name).read_bytes()
    finally:
        signal_group(server, signal.SIGKILL)


class Faulty:
    """A real HTTP server between the run and MLflow's: passes on, or answers as a server in need does."""

    def __init__(self, target: int) -> None:
        self.mode, self.seen = "pass", 0
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                faulty.seen += 1
                mode = faulty.mode
                if mode.isdecimal():
                    return self.reply(int(mode), b"no room", "text/plain")
                ours = urllib.request.Request(
                    f"http://127.0.0.1:{target}{self.path}", body or None, method=self.command
                )
                for name in ("Content-Type",):
                    if name in self.headers:
                        ours.add_header(name, self.headers[name])
                try:
                    with urllib.request.urlopen(ours, timeout=60) as answer:
                        status, text, kind = answer.status, answer.read(), answer.headers["Content-Type"]
                except urllib.error.HTTPError as e:
                    status, text, kind = e.code, e.read(), e.headers["Content-Type"]
                if mode == "slow":
                    time.sleep(2)
                if mode != "lost":  # taken, and the answer never comes
                    self.reply(status, text, kind or "application/json")

            def reply(self, status: int, text: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None: ...

            do_GET = do_POST = do_PUT = do_PATCH = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slow_full_or_lossy_server_costs_no_number(tmp_path: Path) -> None:
    """A server that is slow, full or loses its answers costs no number, and doubles none."""
    root, port = tmp_path / "run", free_port()
    server = start_server(tmp_path, port)
    try:
        faulty = Faulty(port)
        training = start_training(root, 0, None, pause_s=0.01, uri=faulty.uri, close_s=30)  # all is sent, also slowly
        wait_for(lambda: offset(root) > 5_000)
        for mode in ("500", "507", "lost"):
            faulty.mode = mode
            wait_for(lambda: is_away(root))
            faulty.mode = "pass"
            wait_for(lambda: not is_away(root))
        faulty.mode, before = "slow", offset(root)
        wait_for(lambda: offset(root) > before + 2_000)  # goes on, two seconds a request
        wait_for(lambda: not is_away(root))  # an answer of more than 3 s is waited for longer
        faulty.mode = "pass"
        (tmp_path / "stop").touch()
        done = end_of(training)
        print(json.dumps({**done, "requests": faulty.seen}))
        assert done["worst_log_ms"] < 1000
        assert counted(client_of(faulty.uri), done["run_id"]) == logged(root)
    finally:
        signal_group(server, signal.SIGKILL)

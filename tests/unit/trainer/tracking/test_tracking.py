"""Tracking without a server: what is refused, what is imported, where things lie (with MLflow: tests/system)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.frozen import freeze
from conf.schema import load
from tests.helpers.ranks import ROOT
from trainer.check import check_registry
from trainer.config.pretrain import PretrainConfig
from trainer.config.tracking import TrackerName, TrackingConfig, check_tracking, resolved, tracking_uri, ui_command
from trainer.run.code_version import code_version
from trainer.run.environment import code_of
from trainer.run.exit_codes import PREEMPTED
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal, read_rows
from trainer.tracking.shipper import Status
from trainer.tracking.state import STATE, ShippingLock, TrackingState
from trainer.tracking.system_metrics import gpus
from trainer.tracking.tracker import Tracker

DEAD = "http://127.0.0.1:9"  # the discard port: refused at once


def config(root: Path, *overrides: str) -> PretrainConfig:
    cfg: PretrainConfig = load(PretrainConfig, ["experiment=demo", f"run.dir={root}", "data.path=none", *overrides])
    return cfg


def test_none_writes_the_journal_and_never_imports_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit.trainer.tracking.test_tracking import *\n"
        "root = Path(sys.argv[1]); folder = RunFolder(root); generation = folder.take_generation()\n"
        "tracker = Tracker(config(root, 'tracking=none'), folder, generation, 0)\n"
        "tracker.log(1, {'train/loss': 2.5}); tracker.flush(); tracker.log(2, {'train/loss': 2.25})\n"
        "assert tracker.wait_run_id(5) is None\n"
        "tracker.close(); tracker.close()\n"
        "sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_journal(RunFolder(tmp_path).metrics)
    assert [(r.step, r.generation, r.metrics) for r in rows] == [
        (1, 1, {"train/loss": 2.5}),
        (2, 1, {"train/loss": 2.25}),
    ]
    assert not (tmp_path / STATE).exists()


def test_mlflow_missing_is_refused_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # what Python itself takes for "cannot be imported"
    with pytest.raises(UserError, match=r"tracking=mlflow.*pip install gradus\[tracking\].*tracking=none"):
        check_tracking(TrackingConfig(TrackerName.mlflow))
    check_tracking(TrackingConfig(TrackerName.none))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("127.0.0.1:5000", r"tracking.uri=127.0.0.1:5000 has no scheme: give http://HOST:PORT"),
        ("mlruns", "tracking.uri=mlruns has no scheme"),
        ("file:///tmp/mlruns", "tracking.uri=file:///tmp/mlruns: MLflow keeps no new runs .* give sqlite:///FILE"),
        ("https://me:hunter2@host/mlflow", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://me:hunter2@host/mlflow", "PGPASSWORD"),
        ("mysql+pymysql://me:hunter2/3@host/mlflow", "where the database's own client looks"),
        ("postgresql://host/mlflow?user=me&password=hunter2", "PGPASSWORD"),
    ],
)
def test_address_that_cannot_be_right_is_refused_before_training(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_tracking(TrackingConfig(TrackerName.mlflow, uri))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", [None, "http://host:5000", "sqlite:///x.db", "postgresql://u@host/db", "databricks"])
def test_addresses_that_mlflow_knows_pass(uri: str | None) -> None:
    check_tracking(TrackingConfig(TrackerName.mlflow, uri))


def test_default_database_lies_beside_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = TrackingConfig(TrackerName.mlflow)
    uri = tracking_uri(cfg, Path("runs/x"))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert ui_command(uri) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db"
    assert ui_command("sqlite:////a b/m.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"
    assert ui_command("http://host:5000") == "http://host:5000"


def test_mlflows_own_variables_count_before_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    null = TrackingConfig(TrackerName.mlflow)
    assert resolved(null)[1] == "metrics: mlflow.db beside the run folder, experiment gradus"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    cfg, line = resolved(null)
    assert (cfg.uri, cfg.experiment) == ("http://h:1", "theirs")
    assert line == "metrics: http://h:1 (MLFLOW_TRACKING_URI), experiment theirs"
    given = TrackingConfig(TrackerName.mlflow, "http://mine:2", "mine")
    assert resolved(given) == (given, "metrics: http://mine:2, experiment mine")
    none = TrackingConfig(TrackerName.none)
    assert resolved(none) == (none, "")
    for uri, message in (("mlruns", "has no scheme"), ("http://me:hush@h", "holds a password")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match=rf"{message}.*it comes from MLFLOW_TRACKING_URI") as caught:
            resolved(null)
        assert "hush" not in str(caught.value)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    with pytest.raises(UserError, match=r"^MLFLOW_EXPERIMENT_ID is in the environment.*tracking.experiment=NAME"):
        resolved(null)


def test_damaged_state_is_refused_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text('{"uuid": "x", "uri"')
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"tracking.json: not JSON .* delete it"):
        Tracker(config(tmp_path, f"tracking.uri={DEAD}"), folder, folder.take_generation(), 0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, Status.finished),
        (SystemExit(0), Status.finished),
        (SystemExit(PREEMPTED), Status.preempted),
        (SystemExit(143), Status.stopped),
        (KeyboardInterrupt(), Status.stopped),
        (SystemExit(2), Status.failed),
        (UserError("x"), Status.failed),
        (RuntimeError("x"), Status.failed),
    ],
)
def test_a_run_is_told_to_have_ended_as_its_exit_code_says(error: BaseException | None, status: Status) -> None:
    assert Status.of(error) is status


def test_a_start_tells_its_generation_and_its_system_once_a_step(tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="the tracking extra is not installed")
    folder = RunFolder(tmp_path)
    for turn in (0, 1):
        cfg = config(tmp_path, "tracking=none", "tracking.system_s=0.01")
        tracker = Tracker(cfg, folder, 2 * turn + 1, 5 * turn)
        time.sleep(0.1)  # nothing logged: no step that they could be of
        for step in range(5 * turn + 1, 5 * turn + 6):
            tracker.log(step, {"train/loss": 1.0})
            deadline = time.monotonic() + 60
            while not any(r.step == step and "system/cpu_percent" in r.metrics for r in read_journal(folder.metrics)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            tracker.log(step - 1, {"checkpoint/write_s": 1.0})  # from the saver's thread, of an older step
            time.sleep(0.03)
        tracker.restart(2 * turn + 2, 5 * turn + 3)  # a rollback: no step done yet that they could be of
        time.sleep(0.05)
        tracker.close()
    rows = [row for row, _ in read_rows(folder.metrics)]
    assert [(r.step, r.metrics) for r in rows if r.resumed_at is not None] == [
        (step, {"run/generation": float(generation)}) for generation, step in enumerate((0, 3, 5, 8), 1)
    ]
    assert {r.generation for r in rows if "system/cpu_percent" in r.metrics} == {1, 3}
    keyed = [(key, row.step, row.generation) for row in rows for key in row.metrics]
    assert len(keyed) == len(set(keyed))
    assert all(0 <= r.metrics["system/cpu_percent"] <= 100 for r in rows if "system/cpu_percent" in r.metrics)
    assert all(r.metrics["system/network_in_mb_per_s"] >= 0 for r in rows if "system/network_in_mb_per_s" in r.metrics)
    assert [path.name for path in sorted(folder.environments.iterdir())] == ["0001.json", "0003.json"]


def test_the_code_version_names_the_submission_that_differs(tmp_path: Path) -> None:
    """The code version is of the code that runs; a submission of other code is named beside it."""
    folder, (version, patch) = RunFolder(tmp_path), code_version()
    here = {k: v for k, v in version.items() if k not in ("packages", "python")}
    assert code_of(folder) == here
    for number, commit in (("0001", "old"), ("0002", "other"), ("0003", version.get("commit"))):
        (made := tmp_path / "submit" / number).mkdir(parents=True)
        (made / "code.json").write_text(json.dumps({**version, "commit": commit}))
        if patch:
            (made / "code.patch").write_bytes(patch)
        if commit != version.get("commit"):
            assert code_of(folder) == {**here, "submitted": {"number": number, "commit": commit}}
    assert code_of(folder) == here
    (made / "code.patch").write_bytes(b"another")
    assert code_of(folder)["submitted"].keys() == {"number", "changes"}


def sync(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "trainer.tracking", "sync", f"run_dir={root}", *overrides]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_sync_refuses_what_is_no_run_and_one_that_is_being_sent(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the tracking extra is not installed")
    done = sync(tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "holds no metrics.jsonl" in done.stderr, done.stderr
    folder = RunFolder(tmp_path)
    folder.metrics.touch()
    folder.config.write_text(freeze(config(tmp_path)))
    lock = ShippingLock(tmp_path)
    assert lock.take() and not ShippingLock(tmp_path).take()
    done = sync(tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "the run is going on" in done.stderr, done.stderr
    lock.release()
    assert ShippingLock(tmp_path).take()


def test_another_server_starts_from_nothing(tmp_path: Path) -> None:
    """It keeps the run's tag and its last status."""
    state = TrackingState(tmp_path, "http://a", "gradus")
    state.change(run_id="r", offset=77, status="FINISHED", described=True)
    assert TrackingState(tmp_path, "http://a", "gradus").sent.offset == 77
    other = TrackingState(tmp_path, "http://b", "gradus").sent
    assert (other.uuid, other.status, other.offset, other.run_id) == (state.sent.uuid, "FINISHED", 0, None)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("tracking.system_s=-1", "tracking.system_s=-1"),
        ("tracking.register=a/b", "tracking.register='a/b': give a name"),
        ("tracking.register=o'x", 'tracking.register="o\'x": give a name'),
    ],
)
def test_a_tracking_that_cannot_be_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, ["experiment=demo", "data.path=none", override])
    assert str(caught.value).startswith(line)


def test_a_model_that_no_registry_can_hold_is_refused(tmp_path: Path) -> None:
    """Before training."""
    cfg = config(tmp_path, "model.attention=DB", "model.band=4", "tracking.register=mine")
    with pytest.raises(UserError, match=r"tracking.register=mine, but model=demo has attention=DB, band=4"):
        check_registry(cfg.tracking, cfg.model)
    with pytest.raises(UserError, match=r"tracking.register=mine needs MLflow's registry"):
        config(tmp_path, "tracking=none", "tracking.register=mine")


def test_fields_of_nvidia_smi_become_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name stands for the driver's: the second GPU is a MIG slice, which tells no utilisation."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0, 87, 70123, 512.25, 61\\n1, [N/A], 12, [Not Supported], 40\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus() == {
        "system/gpu0/util_percent": 87.0,
        "system/gpu0/memory_mib": 70123.0,
        "system/gpu0/power_w": 512.25,
        "system/gpu0/temperature_c": 61.0,
        "system/gpu1/memory_mib": 12.0,
        "system/gpu1/temperature_c": 40.0,
    }
    program.unlink()
    assert gpus() == {}  # no driver here

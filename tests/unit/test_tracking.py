"""Tracking without a server: what is refused, what is imported, where things lie (with MLflow: tests/system)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema import load
from data_pipeline.config import UserError
from tests.ranks import ROOT
from trainer.address import check_tracking, tracking_uri, ui_command
from trainer.config import PretrainConfig
from trainer.journal import read_journal
from trainer.run_folder import RunFolder
from trainer.tracking import Tracker
from trainer.tracking_config import Tracker as Name
from trainer.tracking_config import TrackingConfig
from trainer.tracking_state import STATE

DEAD = "http://127.0.0.1:9"  # the discard port: refused at once


def config(root: Path, *overrides: str) -> PretrainConfig:
    cfg: PretrainConfig = load("pretrain", ["experiment=demo", f"run.dir={root}", "data.path=none", *overrides])
    return cfg


def test_none_writes_the_journal_and_never_imports_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_tracking import *\n"
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
        check_tracking(TrackingConfig(Name.mlflow))
    check_tracking(TrackingConfig(Name.none))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("127.0.0.1:5000", r"tracking.uri=127.0.0.1:5000 has no scheme: give http://HOST:PORT"),
        ("mlruns", "tracking.uri=mlruns has no scheme"),
        ("https://me:hunter2@host/mlflow", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://me:hunter2@host/mlflow", "PGPASSWORD"),
        ("mysql+pymysql://me:hunter2/3@host/mlflow", "where the database's own client looks"),
        ("postgresql://host/mlflow?user=me&password=hunter2", "PGPASSWORD"),
    ],
)
def test_address_that_cannot_be_right_is_refused_before_training(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_tracking(TrackingConfig(Name.mlflow, uri))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", [None, "http://host:5000", "sqlite:///x.db", "postgresql://u@host/db", "databricks"])
def test_addresses_that_mlflow_knows_pass(uri: str | None) -> None:
    check_tracking(TrackingConfig(Name.mlflow, uri))


def test_default_database_lies_beside_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = TrackingConfig(Name.mlflow)
    uri = tracking_uri(cfg, Path("runs/x"))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert ui_command(uri) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db"
    assert ui_command("sqlite:////a b/m.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"
    assert ui_command("http://host:5000") == "http://host:5000"


def test_damaged_state_is_refused_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text('{"uuid": "x", "uri"')
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"tracking.json: damaged .* delete it"):
        Tracker(config(tmp_path, f"tracking.uri={DEAD}"), folder, folder.take_generation(), 0)

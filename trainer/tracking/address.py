"""Where a run is tracked: what may be said as tracking.uri, and what follows from it. No MLflow."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

from conf.errors import UserError
from trainer.config.tracking import Tracker, TrackingConfig

PASSWORD = r"[^:/@]*:[^@]*@|.*[?&]password="  # in what follows a database's scheme


def check_tracking(cfg: TrackingConfig) -> None:
    """Everything that can be said before training.

    Raises:
        UserError: MLflow is not installed, or the address is none or carries a password.
    """
    if cfg.name is Tracker.none:
        return
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("tracking=mlflow, but mlflow is not installed: pip install gradus[tracking], or tracking=none")
    scheme, mark, rest = (cfg.uri or "sqlite:///").partition("://")
    if not mark and scheme != "databricks":
        raise UserError(f"tracking.uri={cfg.uri} has no scheme: give http://HOST:PORT, or sqlite:///FILE")
    cure, secret = "where the database's own client looks (PostgreSQL: PGPASSWORD or ~/.pgpass)", PASSWORD
    if scheme in ("http", "https"):
        cure, secret = "into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", r"[^/]*@"
    if re.match(secret, rest):
        raise UserError(f"tracking.uri={scheme}://… holds a password, which the run folder would show: put it {cure}")


def tracking_uri(cfg: TrackingConfig, root: Path) -> str:
    """Where the run is tracked: `tracking.uri`, or the database beside the run folder `root`."""
    return cfg.uri or f"sqlite:///{root.resolve().parent / 'mlflow.db'}"


def ui_command(uri: str) -> str:
    """The command that shows the runs in a browser; a server shows them at its own address."""
    return uri if uri.startswith("http") else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])


def artifacts_of(uri: str) -> str | None:
    """Beside a database file; a server knows its own place (without this, MLflow would take the working directory)."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts")

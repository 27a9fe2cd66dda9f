"""Settings of tracking: the server or database that gets the numbers of a run. Standard library only; no MLflow."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from conf.errors import MISSING, UserError


class TrackerName(Enum):
    mlflow = "mlflow"
    none = "none"  # metrics.jsonl in the run folder only


@dataclass
class TrackingConfig:
    name: TrackerName = MISSING
    uri: str | None = None  # mlflow: where the server or the database is
    experiment: str = "gradus"
    system_s: float = 10.0  # between two looks at the CPU, memory, disk, network and GPUs of rank 0's node; 0 = none
    register: str | None = None  # mlflow: the finished run's last checkpoint becomes a version of this model

    def __post_init__(self) -> None:
        if not 0 <= self.system_s < math.inf:
            raise UserError(f"tracking.system_s={self.system_s}: give seconds, or 0 for no system metrics")
        if self.register is not None and self.name is TrackerName.none:
            raise UserError(f"tracking.register={self.register} needs MLflow's registry: give tracking=mlflow, or null")
        if self.register is not None and not re.fullmatch(r"[\w.-]+( [\w.-]+)*", self.register):
            raise UserError(f"tracking.register={self.register!r}: give a name of letters, digits, '.', '_' and '-'")


@dataclass
class SyncConfig:
    """`python -m trainer.tracking sync`: send the rows of a run's journal that MLflow does not have."""

    run_dir: str = MISSING  # of a run that is over or stands still, also a copy of one
    uri: str | None = None  # another server or database than the run's own
    timeout_s: float = 60.0  # a server that takes nothing for so long ends it, exit code 1

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise UserError(f"timeout_s={self.timeout_s}: give a positive number of seconds")


_PASSWORD = r"[^:/@]*:[^@]*@|.*[?&]password="  # in what follows a database's scheme


def check_tracking(cfg: TrackingConfig) -> None:
    """Refuse before training what tracking cannot do.

    Raises:
        UserError: MLflow is not installed, or the uri is none or holds a password.
    """
    if cfg.name is TrackerName.none:
        return
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("tracking=mlflow, but mlflow is not installed: pip install gradus[tracking], or tracking=none")
    scheme, mark, rest = (cfg.uri or "sqlite:///").partition("://")
    if not mark and scheme != "databricks":
        raise UserError(f"tracking.uri={cfg.uri} has no scheme: give http://HOST:PORT, or sqlite:///FILE")
    cure, secret = "where the database's own client looks (PostgreSQL: PGPASSWORD or ~/.pgpass)", _PASSWORD
    if scheme in ("http", "https"):
        cure, secret = "into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", r"[^/]*@"
    if re.match(secret, rest):
        raise UserError(f"tracking.uri={scheme}://… holds a password, which the run folder would show: put it {cure}")


def tracking_uri(cfg: TrackingConfig, root: Path) -> str:
    """The server or database of a run: `tracking.uri`, or the database beside the run folder `root`."""
    return cfg.uri or f"sqlite:///{root.resolve().parent / 'mlflow.db'}"


def ui_command(uri: str) -> str:
    """The command that shows the runs in a browser; a server shows them at its own address."""
    return uri if uri.startswith("http") else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])


def artifacts_of(uri: str) -> str | None:
    """The folder of artifacts beside a database file, not the working directory; None: a server has its own."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts")

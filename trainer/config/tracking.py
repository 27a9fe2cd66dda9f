"""Settings of tracking: the server or database that gets the numbers of a run. Standard library only; no MLflow."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
from dataclasses import dataclass, replace
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
    experiment: str | None = None  # mlflow: its experiment
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


EXPERIMENT = "gradus"
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
    if scheme == "file":
        raise UserError(
            f"tracking.uri={cfg.uri}: MLflow keeps no new runs in folders of files: give sqlite:///FILE, or null for "
            "mlflow.db beside the run folder"
        )
    cure, secret = "where the database's own client looks (PostgreSQL: PGPASSWORD or ~/.pgpass)", _PASSWORD
    if scheme in ("http", "https"):
        cure, secret = "into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", r"[^/]*@"
    if re.match(secret, rest):
        raise UserError(f"tracking.uri={scheme}://… holds a password, which the run folder would show: put it {cure}")


def resolved(cfg: TrackingConfig) -> tuple[TrackingConfig, str]:
    """(the settings with what is null taken from MLflow's own variables, a line that says where the metrics go).

    A variable counts before the defaults, the database beside the run folder and the experiment `EXPERIMENT`.

    Raises:
        UserError: as `check_tracking`; or the experiment is given by its number alone.
    """
    if cfg.name is TrackerName.none:
        return cfg, ""
    uri, experiment = (os.environ.get(f"MLFLOW_{name}") or None for name in ("TRACKING_URI", "EXPERIMENT_NAME"))
    if cfg.experiment is None and experiment is None and os.environ.get("MLFLOW_EXPERIMENT_ID"):
        raise UserError(
            "MLFLOW_EXPERIMENT_ID is in the environment, and experiments go by their names here: give "
            "MLFLOW_EXPERIMENT_NAME or tracking.experiment=NAME"
        )
    made = replace(cfg, uri=cfg.uri or uri, experiment=cfg.experiment or experiment or EXPERIMENT)
    by_variable = cfg.uri is None and uri is not None
    try:
        check_tracking(made)
    except UserError as e:
        raise (UserError(f"{e} (it comes from MLFLOW_TRACKING_URI)") if by_variable else e) from None
    source = " (MLFLOW_TRACKING_URI)" if by_variable else ""
    return made, f"metrics: {made.uri or 'mlflow.db beside the run folder'}{source}, experiment {made.experiment}"


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

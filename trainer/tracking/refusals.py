"""Refusals of a server that stay until somebody does something, each with what that is. No MLflow."""

from __future__ import annotations

from typing import Any

from trainer.tracking.messages import cause


class Refused(Exception):
    """A server's refusal that does not pass by itself; the message says what has to be done."""


def refusal(error: Exception) -> str | None:
    """The thing to do before the server takes anything again; None for an error that may pass by itself."""
    if isinstance(error, Refused):
        return str(error)
    if getattr(error, "error_code", None) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"it does not let this user in ({cause(error)}): set {names}"
    return None


def refuse_deleted(experiment: Any) -> None:
    """Raises Refused for one of MLflow's experiments that is in its trash."""
    if experiment.lifecycle_stage == "deleted":
        raise Refused(
            f"tracking.experiment={experiment.name} is in MLflow's trash: mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}, or give another tracking.experiment at the next start"
        )

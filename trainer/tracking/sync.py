"""Sending the rest of a finished run to MLflow: `python -m trainer.tracking sync`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import TransientError, UserError, of_nature
from conf.frozen import literal, peek, thaw
from trainer.config.tracking import SyncConfig, TrackerName, TrackingConfig, check_tracking, tracking_uri
from trainer.config.train import RunConfig
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import read_heartbeats
from trainer.run.redact import redact
from trainer.tracking.messages import cause, warn
from trainer.tracking.mlflow_sender import Sender
from trainer.tracking.refusals import refusal
from trainer.tracking.shipper import backoff_s, draw_curves
from trainer.tracking.state import ShippingLock

BESIDE_S = 120.0  # that a program waits for a sync in a process of its own
FRESH_S = 60.0  # a heartbeat younger than this is of a run that goes on


def sync(cfg: SyncConfig) -> None:
    """Print {"rows_sent", "backlog", "run_id"}: lines of the journal that were sent now, and that were not.

    Raises:
        UserError: no run folder, or one that its own process is sending.
        TransientError: the server took nothing for `timeout_s`.
    """
    folder = RunFolder(cfg.run_dir)
    frozen = config_of(folder, cfg.uri)
    lock = ShippingLock(folder.root)
    if not lock.take():
        raise UserError(f"run_dir={cfg.run_dir}: the run is going on and sends its rows itself: let it, or wait for it")
    print(f"sends to {tracking_uri(frozen.tracking, folder.root)}", file=sys.stderr, flush=True)
    draw_curves(folder.root, frozen.run.name)
    sender = Sender(frozen.tracking, frozen.run.name, frozen.values, folder)
    if sender.state.sent.status == "RUNNING":  # its process has said nothing of its end
        sender.state.change(status=status_of(folder, frozen.max_steps))
    before = sender.waiting()
    error = deliver(sender, cfg.timeout_s)
    left = sender.waiting()
    print(json.dumps({"rows_sent": before - left, "backlog": left, "run_id": sender.state.sent.run_id}), flush=True)
    lock.release()
    if error is not None and (reason := refusal(error)):
        raise UserError(f"{sender.uri} takes no rows: {reason}")
    if error is not None:
        raise TransientError(
            f"{sender.uri} does not take what is left, in {cfg.timeout_s:g} s ({cause(error)}): try later"
        )


def sync_beside(folder: RunFolder) -> None:
    """Send what a run's folder has gained, in a process of its own, if its tracker is MLflow. A failure is one line."""
    try:
        if peek(folder.config)["tracking"]["name"] != TrackerName.mlflow.name:
            return
    except (UserError, OSError, KeyError, TypeError):
        return
    argv = [sys.executable, "-m", "trainer.tracking", "sync", f"run_dir={literal(str(folder.root.resolve()))}"]
    cwd, limit = Path(__file__).resolve().parents[2], f"timeout_s={BESIDE_S / 4:g}"
    try:
        done = subprocess.run([*argv, limit], cwd=cwd, capture_output=True, text=True, timeout=BESIDE_S)
        why = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as e:
        why = [cause(e)]
    for line in why:
        warn(f"{folder.root} was not sent to MLflow ({line.removeprefix('error: ')}): {' '.join(argv[1:])} does it")


class Frozen(NamedTuple):
    """The config that a run of any kind was started with."""

    tracking: TrackingConfig
    run: RunConfig
    max_steps: int
    values: dict[str, Any]  # all of them


def config_of(folder: RunFolder, uri: str | None) -> Frozen:
    """The config of a run, with MLflow as its tracker. Raises UserError if there is none."""
    if not folder.metrics.is_file():
        raise UserError(f"run_dir={folder.root} holds no {folder.metrics.name}: give the run.dir of a run")
    try:
        values = peek(folder.config)
        tracking = thaw(folder.config, TrackingConfig, "tracking")
        run, max_steps = thaw(folder.config, RunConfig, "run"), int(values["max_steps"])
    except OSError as e:
        raise of_nature(e, f"run_dir={folder.root}: its config cannot be read: {e}") from None
    except Exception as e:  # OmegaConf's many, for a file of another version or a damaged one
        raise UserError(f"{folder.config} is no config of this version ({cause(e)})") from None
    owner, address = folder.config.stat().st_uid, redact(tracking.uri or "")
    if uri is None and address and owner not in (os.getuid(), 0):
        raise UserError(
            f"run_dir={folder.root} is of another user ({owner}), and its config names {address}, which would get your "
            f"credentials: give uri={address} if you trust it, or another uri"
        )
    tracking = replace(tracking, name=TrackerName.mlflow, uri=uri or tracking.uri)
    check_tracking(tracking)
    values["tracking"] = {**values["tracking"], "name": tracking.name.name, "uri": tracking.uri}
    return Frozen(tracking, run, max_steps, values)


def status_of(folder: RunFolder, max_steps: int) -> str:
    """MLflow's status of a run by its files: with its last checkpoint it is finished, with fresh heartbeats it runs."""
    latest = folder.latest()
    if folder.ended() or (latest is not None and folder.state(latest)["step"] >= max_steps):
        return "FINISHED"
    beats = read_heartbeats(folder.heartbeats)
    return "RUNNING" if any(time.time() - beat.time < FRESH_S for beat in beats) else "KILLED"


def deliver(sender: Sender, timeout_s: float) -> Exception | None:
    """Send all that is left; return None, or the last error: of a refusal, or once nothing was taken for `timeout_s`.

    Raises:
        UserError: the journal is damaged.
    """
    failures, since, offset = 0, time.monotonic(), sender.state.sent.offset
    while True:
        try:
            sender.send()
            sender.end()
            return None
        except UserError:
            raise
        except Exception as e:  # whatever MLflow or the network raises
            if sender.state.sent.offset != offset:  # some of it was taken
                failures, since, offset = 0, time.monotonic(), sender.state.sent.offset
            failures += 1
            if refusal(e) or time.monotonic() - since > timeout_s:
                return e
        sender.be_patient(failures, timeout_s)
        time.sleep(min(backoff_s(failures), timeout_s / 10))

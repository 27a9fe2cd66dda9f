"""tracking.json: how far a run's journal has come at MLflow, and tracking.lock: who sends it. No MLflow.

`offset` is the byte of metrics.jsonl up to which the server has answered; `stored` says of each file which state of it
lies there; `status` is what the run last said of itself.
"""

from __future__ import annotations

import fcntl
import json
import uuid
from pathlib import Path
from typing import IO, Any

from conf.errors import UserError
from data_pipeline.files import publish_json

STATE = "tracking.json"
LOCK = "tracking.lock"
KEYS: dict[str, Any] = {
    "run_id": None,
    "offset": 0,
    "described": False,
    "stored": {},
    "status": "RUNNING",
    "registered": None,
}


class TrackingState:
    """What is known of one run at one address; each change is on disk before `change` returns."""

    def __init__(self, root: Path, uri: str, experiment: str) -> None:
        """Raises UserError where the file is damaged. For another address than last time, nothing has been sent yet."""
        self._path, self._place = root / STATE, {"uri": uri, "experiment": experiment}
        self.read()

    def read(self) -> None:
        """Again what is on disk: another process may have sent since."""
        fresh: dict[str, Any] = {**self._place, **KEYS}
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            if {key: body[key] for key in self._place} != self._place:
                body = {key: body[key] for key in ("uuid", "status") if key == "uuid" or key in body}
            unknown = set(body) - {"uuid", *fresh}
            body = {"uuid": body["uuid"], **fresh, **body}
            if unknown or not isinstance(body["offset"], int) or not isinstance(body["stored"], dict):
                raise ValueError(f"keys {sorted(body)}")
        except FileNotFoundError:
            body = {"uuid": uuid.uuid4().hex, **fresh}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{self._path}: damaged ({e!r}): delete it, the journal then goes to a new MLflow run"
            ) from None
        self._body = body
        publish_json(self._path, body)  # before a run is made for it: the tag must outlive a kill

    def __getitem__(self, key: str) -> Any:
        return self._body[key]

    def change(self, **changes: Any) -> None:
        self._body |= changes
        publish_json(self._path, self._body)


class ShippingLock:
    """One process at a time sends a run. A file system without flock has no lock, and the store keeps equal rows once.

    Over NFS the hosts exclude one another from version 4 on, over Lustre where it is mounted with `flock`.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self) -> bool:
        """Whether it is ours now."""
        file = self._path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            pass  # ENOLCK, ENOTSUP: no locks here
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

"""tracking.json: how much of a run its server has, and tracking.lock: the process that sends it. No MLflow."""

from __future__ import annotations

import fcntl
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from data_pipeline.files import from_json, publish_json, read_json

STATE = "tracking.json"
LOCK = "tracking.lock"
CURE = "delete it, the journal then goes to a new MLflow run"


@dataclass(frozen=True)
class Sent:
    """The part of a run that one server has; the fields of tracking.json.

    `offset`: the byte of metrics.jsonl up to which the server has answered. `stored`: the modification time, in ns, of
    each file that it has. `status`: as the run last reported it.
    """

    uuid: str
    uri: str
    experiment: str
    run_id: str | None = None
    offset: int = 0
    described: bool = False
    stored: dict[str, int] = field(default_factory=dict)
    status: str = "RUNNING"
    registered: str | None = None


class TrackingState:
    """The state of one run at one server; each change is on disk before `change` returns."""

    def __init__(self, root: Path, uri: str, experiment: str) -> None:
        """Raises UserError if the file is damaged. For another server than last time, nothing has been sent yet."""
        self._path = root / STATE
        self._uri = uri
        self._experiment = experiment
        self.read()

    def read(self) -> None:
        """Read the file again: another process may have sent since."""
        if self._path.exists():
            sent = from_json(Sent, read_json(self._path, CURE), self._path, CURE)
        else:
            sent = Sent(uuid.uuid4().hex, self._uri, self._experiment)
        if (sent.uri, sent.experiment) != (self._uri, self._experiment):
            sent = Sent(sent.uuid, self._uri, self._experiment, status=sent.status)
        self.sent = sent
        self.change()  # before a run is made for it: the tag must outlive a kill

    def change(self, **changes: Any) -> None:
        """Replace fields of `sent` and publish the file."""
        self.sent = replace(self.sent, **changes)
        publish_json(self._path, asdict(self.sent))


class ShippingLock:
    """One process at a time sends a run. A file system without flock has no lock; the store keeps equal rows once.

    Over NFS hosts exclude one another from version 4 on, over Lustre if it is mounted with `flock`.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self) -> bool:
        """Try to take the lock; return True if this process holds it now."""
        file = self._path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            pass  # ENOLCK, ENOTSUP: this file system has no locks
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

"""A trace of some steps by torch.profiler, for any viewer of Chrome's traces. It changes no number of the run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline.files import publish


class StepTrace:
    """Profiles the steps `first` to `last` and publishes `path`. For one rank; without steps it does nothing.

    `written` is called when the trace is written, which may take long.
    """

    def __init__(self, steps: tuple[int, int] | None, path: Path, written: Callable[[], None]) -> None:
        self._first, self._last = steps or (0, 0)
        self._path = path
        self._written = written
        self._profile: profile | None = None
        self._missing = steps is not None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The step that makes update number `step`."""
        if step == self._first:  # a rollback may come to it again
            self._stop()
            self._profile = profile(activities=_activities())
            self._profile.start()
        if self._profile is None:
            yield
            return
        with record_function(f"step {step}"):
            yield
        if step == self._last:
            self._publish(self._profile)

    def close(self) -> None:
        """End, with a line if there is no trace."""
        self._stop()
        if self._missing:
            self._missing = False
            print(f"profile={self._first}-{self._last}: this start has not made all these steps: no trace", flush=True)

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _publish(self, profile: profile) -> None:
        self._stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            self._path.parent.mkdir(exist_ok=True)
            publish(self._path, file.read_bytes())
        self._missing = False
        print(f"profile={self._first}-{self._last}: {self._path}, for https://ui.perfetto.dev", flush=True)
        self._written()


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

"""Shared by all tests: where the optional development data lies, and small stand-ins for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also beside a GPU: tests/gpu start processes of their own there
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: a thread for each, set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `&` switches it off, and what tests start inherits that

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Development data that lies beside a developer's checkout; users do not have it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here: this test compares on real text that the project does not ship")
    return SHARED


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    """A process that trains alone takes a port for its world and puts it into its environment: not for what the next
    test starts."""
    before = dict(os.environ)
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)

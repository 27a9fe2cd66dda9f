"""Functions for a sandbox in tests: one does what its data says, one cannot be made."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def planted() -> Callable[[bytes, str], str]:
    held: list[bytes] = []

    def function(data: bytes, hint: str) -> str:
        match data:
            case b"spin":
                while True:
                    pass
            case b"hang":
                time.sleep(1e6)
            case b"rest":
                time.sleep(0.5)
            case b"allocate":
                held.append(bytes(4 << 30))
            case b"leak":
                held.append(bytes(150 << 20))
            case b"raise":
                raise ValueError("planted")
            case b"crash":
                ctypes.string_at(0)
            case b"be killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case b"be killed once":
                if not Path(hint).exists():
                    Path(hint).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            case b"print":
                print("noise", flush=True)
                os.write(1, b"noise")
        return f"{data.hex()} {hint}"

    return function


def missing() -> Callable[[bytes, str], str]:
    raise ImportError("No module named 'planted'")

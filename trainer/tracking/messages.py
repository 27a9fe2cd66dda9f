"""Lines of tracking on stderr: they tell of a failure that ends no training. No MLflow."""

from __future__ import annotations

import sys

from trainer.run.redact import redact


def warn(message: str) -> None:
    """Print one line."""
    print(f"tracking: {message}", file=sys.stderr, flush=True)


def cause(error: Exception) -> str:
    """An error in one line, without secrets: the answer of a server, or its address, may hold one."""
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

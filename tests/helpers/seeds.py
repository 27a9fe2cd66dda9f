"""Seeds of random tests."""

from __future__ import annotations

import os
import secrets


def seeded() -> int:
    """A fresh seed of 32 bits, printed: pytest shows it if the test fails. TEST_SEED=N in the environment gives N."""
    seed = int(os.environ.get("TEST_SEED") or secrets.randbits(32))
    print(f"seed {seed}: TEST_SEED={seed} repeats it")
    return seed

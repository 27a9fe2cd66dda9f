"""A process group of one, for tests of a model in the test's own process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from trainer.config.parallel import ParallelConfig
from trainer.distributed.world import read_world


@pytest.fixture(scope="module")
def mesh() -> Iterator[object]:
    """A mesh of dp = tp = 1; the environment is left as it was, so that other tests may start their own world."""
    from trainer.distributed.mesh import join_ranks, leave_ranks

    with patch.dict(os.environ):
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(key, None)
        mesh = join_ranks(read_world(), ParallelConfig(name="one"))
    yield mesh
    leave_ranks(mesh)

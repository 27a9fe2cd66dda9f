"""`python -m tests.system.nan_batches`: trainer.pretrain, on whose batches that hold the marker the loss is NaN."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from conf.schema import run
from tests.system.plants import MARKER
from trainer.config.pretrain import PretrainConfig
from trainer.engine.engine import Engine
from trainer.pretrain import pretrain

backward = Engine.backward


def backward_or_nan(self: Engine, batch: Any, counts: Tensor, last: bool) -> Tensor:
    hit = bool((batch.tokens == MARKER).any())
    return backward(self, batch, counts * (math.nan if hit else 1), last)


if __name__ == "__main__":
    Engine.backward = backward_or_nan  # type: ignore[method-assign]
    run(PretrainConfig, pretrain)

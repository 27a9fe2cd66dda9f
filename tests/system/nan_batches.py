"""`python -m tests.system.nan_batches`: trainer.pretrain, on whose batches that hold the marker the loss is NaN."""

from __future__ import annotations

from torch import Tensor

from conf.schema import run
from data_pipeline.stream.loader import Batch
from tests.system.plants import MARKER
from trainer.config.pretrain import PretrainConfig
from trainer.engine.engine import Engine
from trainer.pretrain import pretrain

backward = Engine.backward


def backward_or_nan(self: Engine, batch: Batch, global_valid_tokens: float | Tensor, last: bool) -> Tensor:
    hit = bool((batch.tokens == MARKER).any())
    return backward(self, batch, float("nan") if hit else global_valid_tokens, last)


if __name__ == "__main__":
    Engine.backward = backward_or_nan  # type: ignore[method-assign]
    run(PretrainConfig, pretrain)

"""Rows of examples to micro batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.examples.rows import packed
from data_pipeline.examples.templates import Example
from data_pipeline.stream.loader import Batch
from trainer.data.example_feed import Collate, Rows


def conversations(examples: Sequence[Example], n_ctx: int) -> Collate:
    """Packed rows of conversations: each a segment of its own, which sees itself alone."""

    def collate(rows: Rows) -> Batch:
        parts = [packed([examples[i] for i in row], n_ctx) for row in rows]
        tokens, labels, segments = (torch.from_numpy(np.stack(x)) for x in zip(*parts, strict=True))
        return Batch(tokens, labels, segments)

    return collate

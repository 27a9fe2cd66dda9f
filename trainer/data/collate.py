"""Packed rows of conversations to micro batches, and the length of rows that are not packed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.examples.rows import packed
from data_pipeline.examples.templates import Example
from data_pipeline.stream.loader import Batch
from trainer.data.example_feed import Collate, Rows

MULTIPLE = 16  # of which the length of a row is one: as fp8 products need it, with little padding


def row_multiple(tp: int) -> int:
    """The number of which a row's length is a multiple, so that `tp` ranks may split it."""
    return math.lcm(MULTIPLE, tp)


def row_tokens(longest: int, n_ctx: int, multiple: int = MULTIPLE) -> int:
    """The tokens of the rows of a micro batch whose longest sequence has `longest`: a multiple, at most n_ctx."""
    return min(n_ctx, -(-longest // multiple) * multiple)


def conversations(examples: Sequence[Example], n_ctx: int) -> Collate:
    """Packed rows of conversations: each a segment of its own, which sees itself alone."""

    def collate(rows: Rows) -> Batch:
        parts = [packed([examples[i] for i in row], n_ctx) for row in rows]
        tokens, labels, segments = (torch.from_numpy(np.stack(x)) for x in zip(*parts, strict=True))
        return Batch(tokens, labels, segments)

    return collate

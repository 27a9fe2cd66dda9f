"""Labelled examples to micro batches: a row for each sequence, as long as the longest of the micro batch needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.config import IGNORE
from data_pipeline.examples.labelled import Labelled
from trainer.data.collate import MULTIPLE, row_tokens
from trainer.data.example_feed import Collate, Rows
from trainer.objective.labelled import LabelledBatch


def labelled(examples: Sequence[Labelled], n_ctx: int, multiple: int = MULTIPLE) -> Collate:
    """Micro batches of labelled examples of one task, whose rows have a multiple of `multiple` tokens, or n_ctx.

    A row of the order without an example becomes one of pads, with as many sequences as the first example, that counts
    nothing.
    """
    pads = Labelled((np.zeros(1, np.int32),) * len(examples[0].sequences), np.nan)

    def collate(rows: Rows) -> LabelledBatch:
        members = [examples[row[0]] if row else pads for row in rows]
        sequences = [ids for member in members for ids in member.sequences]
        width = row_tokens(max(map(len, sequences)), n_ctx, multiple)
        tokens = np.zeros((len(sequences), width), np.int64)
        labels = np.full((len(sequences), width), IGNORE, np.int64)
        for row, ids in enumerate(sequences):
            tokens[row, : len(ids)] = ids
            labels[row, : len(ids) - 1] = ids[1:]
        owner = np.repeat(np.arange(len(members)), [len(member.sequences) for member in members])
        return LabelledBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.tensor([len(ids) - 1 for ids in sequences]),
            torch.from_numpy(owner),
            torch.tensor([member.label for member in members], dtype=torch.float32),
        )

    return collate

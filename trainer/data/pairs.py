"""Pairs of answers to micro batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_pipeline.config import IGNORE
from data_pipeline.examples.pairs import Pair
from trainer.data.collate import MULTIPLE, row_tokens
from trainer.data.example_feed import Collate, Rows
from trainer.objective.preference import Pairs


def pairs(examples: Sequence[Pair], n_ctx: int, multiple: int = MULTIPLE) -> Collate:
    """Rows of the chosen answers, then of the rejected ones, each after its prompt and followed by pads.

    A row without an example is one of pads, without a label.
    """

    def collate(rows: Rows) -> Pairs:
        some = [examples[row[0]] if row else None for row in rows]
        chosen = [(pair.prompt, pair.chosen) if pair else None for pair in some]
        texts = [*chosen, *((pair.prompt, pair.rejected) if pair else None for pair in some)]
        longest = max((len(prompt) + len(answer) - 1 for prompt, answer in filter(None, texts)), default=1)
        tokens = torch.zeros(len(texts), row_tokens(longest, n_ctx, multiple), dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        for i, text in enumerate(texts):
            if text is not None:
                ids, end = torch.from_numpy(text[0]), len(text[0]) + len(text[1]) - 1
                tokens[i, :end] = torch.cat([ids, torch.from_numpy(text[1][:-1])])
                labels[i, len(ids) - 1 : end] = torch.from_numpy(text[1])
        return Pairs(tokens, labels)

    return collate

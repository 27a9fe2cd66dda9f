"""Pairs of answers, one above the other, of comparisons of any number of answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.examples_config import ExamplesConfig
from data_pipeline.examples.read import Preference, read_preferences
from data_pipeline.examples.templates import Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Two answers to one prompt, each with its end token."""

    prompt: np.ndarray  # [p] int32
    chosen: np.ndarray  # [n] int32
    rejected: np.ndarray  # [m] int32

    @property
    def ids(self) -> np.ndarray:
        """All ids, the length of the prompt and of the chosen answer in front."""
        return np.concatenate([[len(self.prompt), len(self.chosen)], *self])


def pairs_of(item: Preference) -> Iterator[Pair]:
    """Every two answers of a comparison that are not of one rank, and not the same."""
    for better, worse in permutations(range(len(item.ranks)), 2):
        chosen, rejected = item.answers[better], item.answers[worse]
        if item.ranks[better] < item.ranks[worse] and not np.array_equal(chosen, rejected):
            yield Pair(item.prompt, chosen, rejected)


def read_pairs(cfg: ExamplesConfig, tokenizer: Tokenizer, n_ctx: int) -> Examples[Pair, Renderer]:
    """The pairs of all comparisons; one of more than n_ctx ids is dropped.

    Raises:
        UserError: files that cannot be read, of no known form or without comparisons, or that hold no pair.
    """
    read = read_preferences(cfg, tokenizer, n_ctx)
    found = Examples[Pair, Renderer]([], [], read.renderer, f"{read.about}, pairs of answers", read.tally)
    found = replace(found, longest=read.longest, unknown=read.unknown)
    for item, path in zip(read.items, read.paths, strict=True):
        if not (pairs := list(pairs_of(item))):
            found.tally.drop("no two answers of different ranks", path)
        found.items += pairs
        found.paths += [path] * len(pairs)
        found.tokens += sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
        found.labels += sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    if not found.items:
        raise UserError(f"path={cfg.path}: no pair of answers in {found.tally.records:,} records: {found.tally}")
    return found

"""The pairs of a comparison: each two answers of which one is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.examples_config import ExamplesConfig
from data_pipeline.examples.read import Preference, read_preferences
from data_pipeline.examples.templates import Renderer
from data_pipeline.tokenizer.tokenizer import Tokenizer


def pairs_of(ranks: np.ndarray) -> np.ndarray:
    """(better, worse) [P, 2]: the answers of each pair that is no tie; 0 is the best rank."""
    return np.argwhere(ranks[:, None] < ranks[None, :])


def pairs_line(preferences: Sequence[Preference], of: str) -> str:
    """The number of pairs, and the share of them in which the longer answer is the better one.

    A reward model that knows lengths alone has that accuracy. Of two equally long answers half a pair counts.
    """
    total, better = 0, 0.0
    for _, answers, ranks in preferences:
        lengths, pairs = np.array([len(answer) for answer in answers]), pairs_of(ranks)
        longer = np.sign(lengths[pairs[:, 0]] - lengths[pairs[:, 1]])
        total += len(pairs)
        better += float((1 + longer).sum()) / 2
    return (
        f"comparisons: the longer answer is the better one in {100 * better / total:.1f}% of {total:,} {of} pairs: an "
        "accuracy near it says nothing"
    )


class Pair(NamedTuple):
    """Two answers to one prompt, each with its end token."""

    prompt: np.ndarray  # [p] int32
    chosen: np.ndarray  # [n] int32
    rejected: np.ndarray  # [m] int32

    @property
    def ids(self) -> np.ndarray:
        """All ids, the length of the prompt and of the chosen answer in front."""
        return np.concatenate([[len(self.prompt), len(self.chosen)], *self])


def pairs_in(item: Preference) -> Iterator[Pair]:
    """Every two answers of a comparison of which one is better, and that are not the same."""
    for better, worse in pairs_of(item.ranks):
        chosen, rejected = item.answers[better], item.answers[worse]
        if not np.array_equal(chosen, rejected):
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
        if not (pairs := list(pairs_in(item))):
            found.tally.drop("no two answers of different ranks", path)
        found.items += pairs
        found.paths += [path] * len(pairs)
        found.tokens += sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
        found.labels += sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    if not found.items:
        raise UserError(f"path={cfg.path}: no pair of answers in {found.tally.records:,} records: {found.tally}")
    return found

"""A reward model finds out what makes an answer better: the share of lower-case vowels in it.

Answers are random letters, not samples of a base model: the pairs are as hard to tell apart, and cost nothing.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_pipeline.examples.read import Preference
from tests.distributed import tiny_run as run
from tests.helpers.ranked import vowel_records
from tests.helpers.ranks import run_ranks
from tests.helpers.seeds import seeded
from trainer.data.comparisons import comparisons
from trainer.model.init import initialise
from trainer.objective.heads import WithHead
from trainer.objective.ranking import Comparisons, Ranking

PROMPTS, HELD_OUT, ROWS = 768, 160, 32  # comparisons to train on and to test with, and those of a step
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_ctx": 20, "vocab_size": 128}
TARGET = 0.92


class Flipped(Ranking):
    """The ranking loss with the wrong sign."""

    def sums(self, module: WithHead, batch: Comparisons) -> torch.Tensor:
        return super().sums(module, batch) * torch.tensor([-1.0, 1.0, 1.0, 1.0])


def preferences(seed: int, n: int) -> list[Preference]:
    out = []
    for record in vowel_records(np.random.default_rng(seed), n):
        prompt, *answers = ([*text.encode()] for text in (record["prompt"], *record["responses"]))  # type: ignore[misc]
        ranks = np.array(record["ranks"], np.int32) - 1
        ends = tuple(np.array([*answer, 0], np.int32) for answer in answers)
        out.append(Preference(np.array(prompt, np.int32), ends, ranks))
    return out


def accuracy_after(steps: int, seed: int, flipped: bool) -> float:
    """On a rank: the share of held-out pairs in the right order after so many steps."""
    objective = Flipped() if flipped else Ranking()
    train, held_out = preferences(seed, PROMPTS), preferences(seed + 1, HELD_OUT)
    cfg = run.config(model=SHAPE, optim={"weight_decay": 0.0})
    with run.layout() as mesh:
        module = WithHead(cfg.model, mesh, n_out=1, std=1 / math.sqrt(cfg.model.n_embd + 1))
        initialise(module, cfg.model, seed)
        engine = run.TinyEngine(module, cfg, mesh, objective)
        collate, rng = comparisons(train, cfg.model.n_ctx, 4), np.random.default_rng(seed + 2)
        for step in range(steps):
            batch = collate([[int(i)] for i in rng.choice(len(train), ROWS, replace=False)])
            counts = torch.tensor(objective.counts(batch), dtype=torch.float64)  # type: ignore[arg-type]
            engine.backward(batch, counts, last=True)
            engine.step(4e-3 * (0.1 + 0.9 * (1 - step / steps)))
        batch = comparisons(held_out, cfg.model.n_ctx, 4)([[i] for i in range(len(held_out))])
        sums, counts_held = engine.evaluate(batch), objective.counts(batch)  # type: ignore[arg-type]
        return float(sums[1]) / counts_held[1]


def check_target(steps: int, flipped: bool = False) -> None:
    where = "tests.distributed.trainer.objective.test_vowels:accuracy_after"
    [accuracy] = run_ranks(1, where, steps=steps, seed=seeded(), flipped=flipped)
    assert accuracy >= TARGET, f"{accuracy:.3f} of held-out pairs after {steps} steps"


def test_held_out_pairs_are_told_apart_by_their_vowels() -> None:
    check_target(64)


def test_the_target_is_missed_where_the_sign_is_wrong() -> None:
    """Fewer steps do to go the wrong way: below what a coin reaches."""
    with pytest.raises(AssertionError, match=r"0\.[0-4]\d\d of held-out pairs after 24 steps"):
        check_target(24, flipped=True)

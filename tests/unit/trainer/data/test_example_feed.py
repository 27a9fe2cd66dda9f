"""The feed of examples: the same rows whatever the ranks, behind a rollback's jump, and for validation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.examples.rows import RowOrder
from tests.helpers.seeds import seeded
from trainer.data.example_feed import ExampleFeed, HeldOut, Rows

ROWS, EXAMPLES = 8, 50
ABOUT = {"examples": "abc", "batch_size": ROWS}


class Seen(NamedTuple):
    members: Tensor


def collate(rows: Rows) -> Seen:
    """The numbers of the examples of each row, -1 for a row without any."""
    return Seen(torch.tensor([row[0] if len(row) else -1 for row in rows]))


def feed(
    dp: int, dp_rank: int, seed: int, *, step: int = 0, state: dict[str, Any] | None = None, held_out: int = 0
) -> ExampleFeed:
    mesh: Any = SimpleNamespace(dp=dp, dp_rank=dp_rank, device=torch.device("cpu"))
    order = RowOrder([1] * EXAMPLES, rows_per_step=ROWS, seed=seed)
    rows = HeldOut([[i] for i in range(held_out)], collate, "some") if held_out else None
    settings: dict[str, Any] = {"about": ABOUT, "micro_batch_size": 2, "n_ctx": 16, "fixed": False}
    return ExampleFeed(order, collate, rows, mesh, step=step, state=state or {}, **settings)


def drawn(one: ExampleFeed) -> list[int]:
    batches, error = one.next()
    assert error is None
    return [i for batch in batches for i in batch[0].tolist()]  # type: ignore[union-attr]


def test_each_epoch_has_each_example_once_on_any_ranks() -> None:
    seed = seeded()
    told = {}
    for dp in (1, 2, 4):
        ranks = [feed(dp, rank, seed) for rank in range(dp)]
        told[dp] = [[i for rank in ranks for i in drawn(rank)] for _ in range(14)]
    assert told[1] == told[2] == told[4]
    epoch = [i for step in told[1][:7] for i in step]
    assert sorted(i for i in epoch if i >= 0) == list(range(EXAMPLES)) and epoch.count(-1) == 7 * ROWS - EXAMPLES
    assert feed(1, 0, seed).row(7)["data/epoch"] == 1 and feed(1, 0, seed).row(14)["data/position"] == 13 * ROWS


def test_a_rollback_goes_on_behind_what_was_bad() -> None:
    """From step 3, after steps 4 to 6 were bad: the next rows are those of step 7; so after a second jump."""
    seed = seeded()
    whole = feed(1, 0, seed)
    steps = [drawn(whole) for _ in range(20)]
    once = feed(2, 0, seed, step=3, state=whole.jump(3, 6))
    other = feed(2, 1, seed, step=3, state=whole.jump(3, 6))
    assert [drawn(once) + drawn(other) for _ in range(4)] == steps[6:10]
    assert once.position(2) == 2 * ROWS and once.position(3) == 6 * ROWS
    twice = feed(1, 0, seed, step=5, state=once.jump(5, 7))
    assert twice.position(4) == 7 * ROWS and [drawn(twice) for _ in range(3)] == steps[10:13]
    assert twice.state(4) == {**ABOUT, "starts": [(0, 0), (3, 6 * ROWS)]}
    assert feed(1, 0, seed, step=9, state=twice.state(9)).position(9) == twice.position(9)


@pytest.mark.parametrize("held_out", [1, 4, 9, 16])
def test_validation_sees_each_example_once(held_out: int) -> None:
    found, numbers = [], []
    for rank in range(2):
        [validation] = feed(2, rank, 0, held_out=held_out).validation(1)
        batches = [batch for batch, error in validation.batches if error is None]
        numbers.append(len(batches))
        found += [i for batch in batches for i in batch[0].tolist()]  # type: ignore[union-attr]
    assert numbers[0] == numbers[1] == -(-held_out // 4)
    assert sorted(i for i in found if i >= 0) == list(range(held_out))


def test_the_checksum_is_of_the_rows_of_one_step() -> None:
    one, again = feed(1, 0, 3), feed(1, 0, 3, step=5)
    for _ in range(5):
        drawn(one)
    assert drawn(one) == drawn(again) and np.isclose(one.row(6)["data/crc32"], again.row(6)["data/crc32"])

"""Rows of texts that begin alike: a token sees its own text alone, and no layout costs more than rows of one text."""

from __future__ import annotations

import random

import pytest
import torch

from tests.helpers.seeds import seeded
from trainer.config.attention import DENSE
from trainer.inference.packing import Request, Row, batches, rows
from trainer.model.mask import attention_bias

N_CTX, C = 64, 32


def requests(draw: random.Random, contexts: int, most: int) -> list[Request]:
    """Some of one token, some equal, some the beginning of others, of a vocabulary so small that texts begin alike."""
    out = []
    for _ in range(contexts):
        context = [draw.randrange(3) for _ in range(draw.randint(1, 20))]
        for _ in range(draw.randint(1, most)):
            out.append(Request(len(out), context, [draw.randrange(3) for _ in range(draw.randint(1, 9))], 0))
    return out


def test_a_token_of_a_row_sees_its_own_text_alone() -> None:
    draw = random.Random(seeded())
    packed = rows(requests(draw, 40, 5), C, 2 * N_CTX)
    assert sum(not row.is_plain for row in packed) > 5 and sum(len(row.requests) > 1 for row in packed) > 10
    for row in packed:
        tokens, segments, positions, columns = row.lay_out()
        assert len(tokens) == len(segments) == len(positions) == row.width
        bias = attention_bias(
            row.width, row.width, torch.empty(()), torch.tensor([segments]), DENSE, torch.tensor([positions])
        )
        assert bias is not None
        for r, own in zip(row.requests, columns, strict=True):
            assert len(own) == len(r.continuation)
            for n, column in enumerate(own, len(r.context)):
                seen = (bias[0, 0, column] == 0).nonzero()[:, 0].tolist()
                assert sorted(positions[i] for i in seen) == list(range(n))
                by_position = sorted(seen, key=positions.__getitem__)
                assert [tokens[i] for i in by_position] == r.ids[:n]
                if row.is_plain:  # what the causal mask says
                    assert by_position == list(range(column + 1))


def test_rows_are_a_function_of_the_set_of_requests() -> None:
    draw = random.Random(seeded())
    given = requests(draw, 30, 6)
    packed = rows(given, C, N_CTX)
    assert sorted(r.index for row in packed for r in row.requests) == list(range(len(given)))
    for row in packed:
        assert len({tuple(r.context) for r in row.requests}) == 1
        assert row.width <= N_CTX or len(row.requests) == 1
    shuffled = draw.sample(given, len(given))

    def texts(packed: list[Row]) -> list[list[list[int]]]:
        return [[r.ids for r in row.requests] for row in packed]

    assert texts(rows(shuffled, C, N_CTX)) == texts(packed)


@pytest.mark.parametrize(("trunk", "together"), [(1, False), (400, True)])
def test_a_row_is_shared_where_that_costs_less(trunk: int, together: bool) -> None:
    """Attention looks at the branches of others: many long ones on a short trunk would cost more than they save."""
    given = [Request(i, [7] * trunk, [i] * 40, 0) for i in range(4)]
    packed = rows(given, C, 10_000)
    assert len(packed) == (1 if together else 4)
    assert sum(row.width for row in packed) == (trunk + 4 * 39 if together else 4 * (trunk + 39))
    equal = [Request(i, [7] * trunk, [1] * 40, 0) for i in range(100)]
    (row,) = rows(equal, C, 10_000)
    assert row.width == trunk + 39 and row.is_plain


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_batch_holds_no_more_tokens_than_full_rows_would(batch_size: int) -> None:
    draw = random.Random(seeded())
    wide = [
        Request(60 + i, [1] * 50, [i] * 10, 0) for i in range(4)
    ]  # they share a row of 86 tokens if it may be so wide
    packed = rows([*requests(draw, 60, 12), *wide, Request(64, [2] * 5, [3], 0)], C, min(2, batch_size) * N_CTX)
    assert batch_size == 1 or max(row.width for row in packed) > N_CTX
    found = list(batches(packed, batch_size, N_CTX))
    assert sorted(id(row) for batch in found for row in batch) == sorted(map(id, packed))
    for batch in found:
        assert len(batch) <= batch_size and len(batch) * max(row.width for row in batch) <= batch_size * N_CTX
        assert len({row.is_plain for row in batch}) == 1 and batch[0].width == max(row.width for row in batch)
    plain = [batch[0].is_plain for batch in found]
    assert plain == sorted(plain) and set(plain) == {True, False}

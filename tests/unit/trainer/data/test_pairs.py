"""Pairs of answers as rows: chosen then rejected, with the answers and their end tokens as labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.examples.examples_config import ExamplesConfig
from data_pipeline.examples.pairs import Pair, read_pairs
from tests.helpers.chat import small_vocabulary, write_lines
from trainer.config.tuning.dpo import DpoConfig
from trainer.data.collate import row_multiple
from trainer.data.pairs import pairs
from trainer.tuning.check import Reader, split


def pair(prompt: int, chosen: int, rejected: int) -> Pair:
    """Of these lengths; the prompt is 1s, the answers 2s and 3s, each with 9 at its end."""
    ids = ([1] * prompt, [2] * (chosen - 1) + [9], [3] * (rejected - 1) + [9])
    return Pair(*(np.array(x, np.int32) for x in ids))


def test_the_answer_and_its_end_token_are_the_labels() -> None:
    tokens, labels = pairs([pair(3, 2, 4)], 1024)([[0], []])
    assert tokens is not None and labels is not None
    assert tokens.shape == labels.shape == (4, 16)
    assert tokens[:, :7].tolist() == [[1, 1, 1, 2, 0, 0, 0], [0] * 7, [1, 1, 1, 3, 3, 3, 0], [0] * 7]
    x = IGNORE
    assert labels[:, :7].tolist() == [[x, x, 2, 9, x, x, x], [x] * 7, [x, x, 3, 3, 3, 9, x], [x] * 7]
    assert (tokens[:, 6:] == 0).all() and (labels[:, 6:] == IGNORE).all()


@pytest.mark.parametrize(
    ("longest", "n_ctx", "tp", "width"), [(65, 1024, 1, 64), (66, 1024, 1, 80), (98, 100, 1, 100), (20, 960, 3, 48)]
)
def test_rows_are_as_long_as_the_longest_needs(longest: int, n_ctx: int, tp: int, width: int) -> None:
    tokens, _ = pairs([pair(5, 2, longest - 5), pair(1, 1, 1)], n_ctx, row_multiple(tp))([[1], [0]])
    assert tokens is not None and tokens.shape == (4, width)


def test_a_comparison_gives_each_pair_that_is_no_tie(tmp_path: Path) -> None:
    """Of four answers with one tie five pairs; the same text twice is none, and what gives no pair is counted."""
    records = [
        {"prompt": "a", "responses": ["w", "x", "y", "z"], "ranks": [2, 1, 2, 3]},
        {"prompt": "b", "responses": ["x", "x", "y"], "ranks": [1, 2, 2]},
        {"prompt": "c", "responses": ["x", "y"], "ranks": [1, 1]},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    found = read_pairs(ExamplesConfig(path=str(path)), small_vocabulary(), 64)
    decode = found.renderer.tokenizer.decode
    texts = [(decode(p.chosen[:-1].tolist()), decode(p.rejected[:-1].tolist())) for p in found.items]
    assert sorted(texts[:5]) == [("w", "z"), ("x", "w"), ("x", "y"), ("x", "z"), ("y", "z")]
    assert texts[5:] == [("x", "y")] and len(found.paths) == 6
    assert all(p.chosen[-1] == p.rejected[-1] == found.renderer.end for p in found.items)
    assert found.tokens == sum(2 * len(p.prompt) + 4 for p in found.items) and found.labels == 24
    lines = " ".join(found.summary())
    assert "6 of 3 records" in lines and "1 dropped: no answer is ranked above another" in lines
    path.write_text(json.dumps(records[2]) + "\n")
    with pytest.raises(UserError, match="no example in 1 records"):
        read_pairs(ExamplesConfig(path=str(path)), small_vocabulary(), 64)


def test_pairs_of_one_prompt_are_all_held_out_or_none(tmp_path: Path) -> None:
    records = [
        {"prompt": f"a {i}", "responses": [f"{i} {k}" for k in range(4)], "ranks": [1, 2, 3, 4]} for i in range(40)
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    reader = Reader(
        lambda path, tokenizer, n_ctx: read_pairs(ExamplesConfig(path=path), tokenizer, n_ctx),
        lambda pair: pair.ids,
        side=lambda pair: pair.prompt,
    )
    tokenizer = small_vocabulary()
    train, held_out = split(reader.read(str(path), tokenizer, 64).items, 0.3, reader)
    prompts = [{pair.prompt.tobytes() for pair in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1] and sum(map(len, prompts)) == 40
    assert len(train) == 6 * len(prompts[0]) and len(held_out) == 6 * len(prompts[1]) > 0
    assert len({pair.ids.tobytes() for pair in train}) == len(train)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_a_beta_that_holds_nothing_is_refused(beta: float) -> None:
    from conf.schema import load

    needed: list[Any] = ["init_from=runs/a", "examples.path=a.jsonl"]
    assert load(DpoConfig, needed).beta == 0.1
    with pytest.raises(UserError, match=f"beta={beta}"):
        load(DpoConfig, [*needed, f"beta={beta}"])

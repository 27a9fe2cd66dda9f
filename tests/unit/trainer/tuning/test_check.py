"""A tuning that goes on has the same examples, labels and settings, or is refused before torch is imported."""

from __future__ import annotations

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.examples.labelled import Labelled
from data_pipeline.examples.templates import Example
from trainer import finetune, sft
from trainer.tuning.check import Reader, check_same, digest


def test_other_examples_or_settings_are_refused() -> None:
    state = {"examples": "abd", "batch_size": 8, "starts": [[0, 0]]}
    check_same({"examples": "abd", "batch_size": 8, "template": "roles"}, state)
    check_same({"examples": "abd"}, {})
    with pytest.raises(UserError, match=r"has examples abd, and this start abc: give the old examples"):
        check_same({"examples": "abc", "batch_size": 8}, state)
    with pytest.raises(UserError, match=r"has batch_size 8, and this start 16"):
        check_same({"examples": "abd", "batch_size": 16}, state)


def test_the_digest_tells_labels_and_order_apart() -> None:
    def read(*_: object) -> object:
        raise AssertionError

    ids = np.arange(5, dtype=np.int32)
    reader: Reader = Reader(read, sft.all_ids)  # type: ignore[type-arg, arg-type]
    masks = [np.array([0, 0, 1, 1, 1], bool), np.array([0, 0, 0, 1, 1], bool)]
    some = [Example(ids, mask) for mask in masks]
    assert digest(some, reader) == digest(list(some), reader)
    assert len({digest(x, reader) for x in (some, some[::-1], some[:1], [some[0]] * 2)}) == 4
    labelled: Reader = Reader(read, finetune.all_ids)  # type: ignore[type-arg, arg-type]
    assert digest([Labelled((ids,), 0.0)], labelled) != digest([Labelled((ids,), 1.0)], labelled)

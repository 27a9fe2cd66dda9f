"""Completions whose middle alone is learnt, and the vocabulary of runs that rearrange texts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.examples.templates import Example
from data_pipeline.manifest import TOKENIZER, read_manifest, write_manifest
from data_pipeline.stream.infill import Infill
from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.seeds import seeded
from tests.system.runs import letters, make_data
from tests.system.tunings import refusal
from trainer.sft import infilled

PREFIX, SUFFIX, MIDDLE, END = 301, 302, 303, 256
SIZES = ("max_steps=4", "data.lanes=4", "tokens_per_step=512", "micro_batch_size=2", "data.fim_rate=0.5")


def test_a_completion_comes_back_from_its_three_parts() -> None:
    """Behind its prompt; the middle and its end are the labels; the share is the rate within six deviations."""
    seed, changed, n = seeded(), 0, 2000
    rng, infill = np.random.default_rng(seed), Infill(0.5, seed, PREFIX, SUFFIX, MIDDLE, END)
    for number in range(n):
        prompt, answer = (rng.integers(0, 256, size) for size in rng.integers(0, 20, 2))
        ids = np.concatenate([[END], prompt, answer, [END]]).astype(np.int32)
        example = Example(ids, np.arange(len(ids)) > len(prompt))
        got = infilled(example, infill, number)
        assert got.ids.dtype == np.int32 and len(got.ids) == len(got.mask)
        if got is example:
            continue
        changed += 1
        row = got.ids.tolist()
        suffix, middle = row.index(SUFFIX), row.index(MIDDLE)
        assert row[:2] == [END, PREFIX] and row[-1] == END and len(row) == len(ids) + 3
        assert row[2:suffix] + row[middle + 1 : -1] + row[suffix + 1 : middle] == ids[1:-1].tolist()
        assert row[2:suffix][: len(prompt)] == prompt.tolist()
        assert got.mask.tolist() == [at > middle for at in range(len(row))]
    assert abs(changed / n - 0.5) <= 6 * math.sqrt(0.25 / n)


def with_ids(data: Path, n: int) -> Path:
    """Sources with a vocabulary of n ids: bytes, the end of a text, and special tokens."""
    tokenizer = Tokenizer.load(data / "train")
    raw = tokenizer.with_special({f"<|{i}|>": i for i in range(257, n)})
    for split in ("train", "val"):
        raw.save(data / split)
        write_manifest(replace(read_manifest(data / split), vocab_size=n, tokenizer_sha256=raw.sha256))
    return data


def test_a_vocabulary_without_free_rows_is_refused(tmp_path: Path) -> None:
    data = with_ids(letters(make_data(tmp_path / "data", vocab_size=257)), 318)
    said = refusal("pretrain", tmp_path / "run", f"data.path={data}", "model.vocab_size=318", *SIZES)
    assert "data.fim_rate=0.5 needs ids for <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>" in said
    assert "its 318 ids leave 2 of the 320 rows of the embedding free: give model.vocab_size=321" in said
    wrong = refusal("pretrain", tmp_path / "run", f"data.path={data}", "model.vocab_size=400", *SIZES)
    assert "was written with a vocabulary of 318" in wrong


def test_a_vocabulary_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    data = letters(make_data(tmp_path / "data", vocab_size=257))
    raw = (data / "train" / TOKENIZER).read_text().replace("<|endoftext|>", "<|something|>")
    (data / "train" / TOKENIZER).write_text(raw)
    said = refusal("pretrain", tmp_path / "run", f"data.path={data}", *SIZES)
    assert "has no <|endoftext|>, with which a middle ends" in said


@pytest.mark.parametrize(("knob", "entry"), [("data.fim_rate", "pretrain"), ("fim_rate", "sft")])
def test_a_rate_that_is_no_share_is_refused(tmp_path: Path, knob: str, entry: str) -> None:
    given = ("data.path=x", "max_steps=4") if entry == "pretrain" else ("examples.path=x", "init_from=y")
    assert f"{knob}=1.5: give a share from 0" in refusal(entry, tmp_path / "run", *given, f"{knob}=1.5")

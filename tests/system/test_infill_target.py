"""A tuned model copies a middle from the text behind it, and cannot know it from the text before."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import INFILL
from tests.helpers.prose_base import MODEL, prose_base
from tests.helpers.ranks import run_ranks
from tests.system.runs import pretrain
from tests.system.tunings import json_lines, tune, words
from trainer.checkpoint.find import find_checkpoint, model_of
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal

STEPS, ROWS = 600, 48
RATE = ("optim.lr=2e-3", "optim.schedule.warmup=20", "optim.weight_decay=0")


def prose() -> str:
    from pydoc_data.topics import topics

    return "".join(c for c in " ".join(topics.values()) if c.isascii() and c != "|")


def planted(among: list[str], n: int, rng: random.Random, first: float) -> list[dict[str, str]]:
    """`TEXT|WORD -> WORD`, in which the first word or the second is to be filled in."""
    text, records = prose(), []
    for _ in range(n):
        at, word = rng.randrange(len(text) - 8), rng.choice(among)
        before = text[at : at + 8] + "|"
        is_first = rng.random() < first
        prompt, suffix = (before, f" -> {word}\n") if is_first else (f"{before}{word} -> ", "\n")
        if rng.random() < 0.5 and first < 1:
            prompt, suffix, word = before, "", f"{word} -> {word}\n"
        records.append({"prompt": prompt, "suffix": suffix, "completion": word})
    return records


def filled(run: str, records: list[dict[str, str]]) -> list[float]:
    """On a rank: the share of middles that are right and end, with both sides, and of right words from the left."""
    from trainer.generate import load_model
    from trainer.inference.requests import Sampling
    from trainer.inference.sampler import sample

    checkpoint = find_checkpoint(run)
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
    prefix, suffix, middle = (tokenizer.special_ids[token] for token in INFILL)
    end = int(str(tokenizer.eot_id))
    model = load_model(checkpoint, model_of(checkpoint, RunFolder.state(checkpoint)))

    def right(asked: list[list[int]], wanted: list[list[int]]) -> float:
        new = sample(model, asked, Sampling(0.0), max_new_tokens=9, eot=end, batch_size=100)
        return sum(ids[: len(w)] == w for ids, w in zip(new, wanted, strict=True)) / len(asked)

    left = [[end, *tokenizer.encode(r["prompt"])] for r in records]
    both = [
        [end, prefix, *ids[1:], suffix, *tokenizer.encode(r["suffix"]), middle]
        for ids, r in zip(left, records, strict=True)
    ]
    word = [tokenizer.encode(r["completion"]) for r in records]
    return [right(both, [[*ids, end] for ids in word]), right(left, word)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a base; its shards are beside it."""
    return prose_base(tmp_path_factory.mktemp("base"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_middle_is_copied_from_the_text_behind_it(base: Path, tmp_path: Path) -> None:
    among, rng = words(0), random.Random(1)
    examples = json_lines(tmp_path / "train.jsonl", planted(among[:-300], STEPS * ROWS * 2, rng, 0.5))
    rows = ("batch_size=16", "micro_batch_size=16", f"max_steps={STEPS}", "checkpoint.every_steps=0")
    tune("sft", tmp_path / "run", f"init_from={base}", f"examples.path={examples}", *rows, *RATE, "epochs=0")
    asked: dict[str, Any] = {"run": str(tmp_path / "run"), "records": planted(among[-300:], 200, rng, 1.0)}
    [[both, left]] = run_ranks(1, "tests.system.test_infill_target:filled", **asked)
    print(json.dumps({"both": both, "left": left}))
    assert both >= 0.85 and left <= 0.02


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_half_rearranged_costs_plain_text_little(base: Path, tmp_path: Path) -> None:
    """The validation loss on plain text, at equal steps from one base."""
    size = (f"data.path={base.parent / 'shards'}", "data.lanes=32", "tokens_per_step=2048", "micro_batch_size=32")
    steps = (f"init_from={base}", "max_steps=250", "checkpoint.every_steps=0")
    losses = []
    for rate in (0.0, 0.5):
        run = tmp_path / str(rate)
        pretrain(run, *MODEL, *size, *steps, *RATE, f"data.fim_rate={rate}")
        losses.append(read_journal(run / "metrics.jsonl")[-1].metrics["val/loss"])
    print(json.dumps(losses))
    assert 0 < losses[1] - losses[0] < 0.10

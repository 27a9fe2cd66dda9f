"""`python -m trainer.tuning.sample_answers`: its texts are the sampler's, on any number of ranks, and come once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import load
from tests.helpers.ranks import run_ranks
from tests.helpers.seeds import seeded
from tests.system.tunings import conversation, json_lines, launch, small_base, succeed, tune
from trainer.config.tuning.sample_answers import SampleAnswersConfig
from trainer.tuning.sample_answers import sample_answers

PROMPTS = [{"prompt": "ab"}, {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "c d"}]}]
N = 3


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt to end some of its answers."""
    root = tmp_path_factory.mktemp("run")
    examples = json_lines(root / "a.jsonl", [conversation("ab", "c."), conversation("ab", "d.")] * 4)
    given = (f"init_from={small_base(root)}", f"examples.path={examples}", "batch_size=4", "micro_batch_size=2")
    tune("sft", root / "run", *given, "max_steps=12", "epochs=0", "optim.lr=1e-2")
    return root / "run"


def test_answers_are_drawn_once_and_alike_on_two_ranks(run: Path, tmp_path: Path) -> None:
    """The journal of evaluations holds them: the same command again draws nothing."""
    prompts = json_lines(tmp_path / "prompts.jsonl", PROMPTS)
    given = [f"checkpoint={run}", f"examples.path={prompts}", "examples.template=roles", f"n={N}", f"seed={seeded()}"]
    given += ["max_new_tokens=12", "temperature=2"]

    def made(name: str, *more: str, ranks: int = 1) -> list[dict[str, Any]]:
        succeed(launch("tuning.sample_answers", [*given, f"output={tmp_path / name}", *more], ranks=ranks))
        return read(tmp_path / name)

    def journal() -> list[str]:
        return sorted(line for path in run.glob("evaluations/*/journal/*.jsonl") for line in path.read_text().split())

    found, kept = made("one.jsonl"), journal()
    assert [record["prompt"] for record in found] == [record["prompt"] for record in PROMPTS]
    for record in found:
        assert len(record["ended"]) == N == len(record["responses"])
        assert not any("<|assistant_end|>" in text for text in record["responses"])
    assert any(len(set(record["responses"])) > 1 for record in found)
    assert made("again.jsonl") == found and journal() == kept != []
    shutil.rmtree(run / "evaluations")
    assert made("two.jsonl", "batch_size=1", ranks=2) == found and journal()


def test_a_cold_sample_is_the_likeliest_answer(run: Path, tmp_path: Path) -> None:
    """Both samples are the text that the tests' own reading of the tuned model gives, and they end."""
    prompts = json_lines(tmp_path / "prompts.jsonl", [{"prompt": "ab"}])
    given = [f"checkpoint={run}", f"examples.path={prompts}", "examples.template=roles", "n=2", "temperature=0.01"]
    succeed(launch("tuning.sample_answers", [*given, f"output={tmp_path / 'out.jsonl'}"]))
    [[likeliest]] = run_ranks(1, "tests.system.tunings:answers", run=str(run), asked=["ab"])
    assert likeliest is not None
    assert read(tmp_path / "out.jsonl") == [{"prompt": "ab", "responses": [likeliest] * 2, "ended": [True] * 2}]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("n=0", "n=0: give at least 1"),
        ("temperature=0", "temperature=0.0: give more than 0"),
        ("output=s3://bucket/a.jsonl", "nothing is written to a URL"),
        ("output=PROMPTS", "is there: give another one"),
        ("checkpoint=BASE", "lacks special tokens of the template roles"),
        ("examples.path=none.jsonl", "none.jsonl"),
        ("examples.path=SUFFIXED", "prompts with a suffix"),
    ],
)
def test_a_mistake_is_one_line(override: str, line: str, run: Path, tmp_path: Path) -> None:
    prompts = json_lines(tmp_path / "prompts.jsonl", PROMPTS)
    given = [f"checkpoint={run}", f"examples.path={prompts}", "examples.template=roles", f"output={tmp_path / 'out'}"]
    suffixed = json_lines(tmp_path / "suffixed.jsonl", [{"prompt": "a", "suffix": "b"}])
    words = override.replace("PROMPTS", str(prompts)).replace("BASE", str(run.parent / "base"))
    words = words.replace("SUFFIXED", str(suffixed))
    given += ["examples.template=text"] if "SUFFIXED" in override else []
    with pytest.raises(UserError, match=re.escape(line)):
        sample_answers(load(SampleAnswersConfig, [*given, words]))
    assert read(prompts) == PROMPTS and not (tmp_path / "out").exists()

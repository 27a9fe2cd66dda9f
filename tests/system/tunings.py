"""Whole runs of the tunings, as a user starts them, and the examples that they are given."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from conf.errors import UserError
from conf.schema import load
from data_pipeline.examples.examples_config import Template
from data_pipeline.examples.forms import USER, Turn
from data_pipeline.examples.templates import Renderer
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.ranks import Process, free_port, rank_env, start_module
from tests.system.runs import finish, letters, make_data, pretrain
from trainer.checkpoint.find import find_checkpoint, model_of
from trainer.run.folder import RunFolder

TINY = (
    "model=test",
    "model.vocab_size=257",
    "model.dropout=0",
    "optim=small",
    "optim.schedule.warmup=1",
    "precision=fp32",
    "tracking=none",
)
TASKS = {"first": lambda word: word[0], "last": lambda word: word[-1], "upper": str.upper}


def small_base(root: Path, *overrides: str, steps: int = 2) -> Path:
    """The folder of a run of some steps on the 256 bytes, with a vocabulary of 257."""
    data = letters(make_data(root / "data", vocab_size=257))
    pretrain(root / "base", f"data.path={data}", "model.vocab_size=257", f"max_steps={steps}", *overrides)
    return root / "base"


def launch(entry: str, words: Sequence[str], ranks: int = 1) -> list[Process]:
    """`python -m trainer.ENTRY WORDS...` on each rank."""
    port = free_port()
    return [start_module(f"trainer.{entry}", list(words), rank_env(r, ranks, port)) for r in range(ranks)]


def succeed(processes: list[Process], timeout_s: float = 800) -> None:
    ended = finish(processes, timeout_s)
    assert all(code == 0 for code, _ in ended), "\n".join(err[-3000:] for _, err in ended)


def start(entry: str, run_dir: Path, *overrides: str, ranks: int = 1) -> list[Process]:
    return launch(entry, [*TINY, f"run.dir={run_dir}", *overrides], ranks)


def tune(entry: str, run_dir: Path, *overrides: str, ranks: int = 1) -> None:
    succeed(start(entry, run_dir, *overrides, ranks=ranks))


def export(run_dir: Path, out: Path) -> None:
    succeed(launch("export_hf", [f"checkpoint={run_dir}", f"out={out}"]))


def refusal(entry: str, run_dir: Path, *overrides: str) -> str:
    """The message of a run that is refused."""
    function = getattr(importlib.import_module(f"trainer.{entry}"), entry)
    with pytest.raises(UserError) as told:
        function(load(get_type_hints(function)["cfg"], [*TINY, f"run.dir={run_dir}", *overrides]))
    return str(told.value)


def json_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def conversation(*turns: str) -> dict[str, Any]:
    """Turns of a user and an assistant, one after the other."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def instructions(words: Sequence[str]) -> list[dict[str, Any]]:
    """The planted instructions: `first: WORD`, `last: WORD` and `upper: WORD`, each with its answer."""
    return [conversation(f"{task}: {word}", answer(word)) for word in words for task, answer in TASKS.items()]


def words(seed: int) -> list[str]:
    """Words of 3 to 7 letters of Python's own prose, shuffled."""
    from pydoc_data.topics import topics

    found = sorted(set(re.findall(r"\b[a-z]{3,7}\b", " ".join(topics.values()))))
    random.Random(seed).shuffle(found)
    return found


def answers(run: str, asked: list[str], new_tokens: int = 9) -> list[str | None]:
    """On a rank: the likeliest answer of a tuned model to each question; None where it does not end."""
    from trainer.generate import load_model
    from trainer.inference.requests import Sampling
    from trainer.inference.sampler import sample

    checkpoint = find_checkpoint(run)
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
    renderer = Renderer(Template.roles, tokenizer)
    model = load_model(checkpoint, model_of(checkpoint, RunFolder.state(checkpoint)))
    prompts = [e.ids.tolist() for e in renderer.encode([renderer.prompt([Turn(USER, text)]) for text in asked])]
    new = sample(model, prompts, Sampling(0.0), max_new_tokens=new_tokens, eot=renderer.end, batch_size=100)
    return [tokenizer.decode(ids[:-1]) if ids and ids[-1] == renderer.end else None for ids in new]

"""A reward model and direct preference optimisation reach what plain torch reached: answers with more vowels win."""

from __future__ import annotations

import contextlib
import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.corpus import pydocs
from tests.helpers.chat import write_lines
from tests.helpers.fixtures import make_source
from tests.helpers.ranks import run_ranks
from tests.system.runs import letters, pretrain
from tests.system.tunings import launch, succeed
from trainer.run.journal import read_journal

HERE = "tests.system.test_preference_targets"
PROMPT = ANSWER = 16  # letters
SIZES = ("model=test", "model.vocab_size=257", "precision=fp32", "tracking=none")
SCHEDULE = ("optim.weight_decay=0", "optim.schedule.floor=0.1")


def prose() -> list[str]:
    """The manual and the docstrings of Python's standard library, as ASCII."""
    found: list[str] = []
    for path in pydocs.files():
        with contextlib.suppress(SyntaxError, ValueError):
            found += [part for _, text in pydocs.texts(path) for part in text.split("\n\n")]
    random.Random(0).shuffle(found)
    return [text for text in found if text.isascii() and len(text) > 100]


def source(root: Path) -> list[str]:
    """Shards of the prose in bytes, of which the last texts are held out; returns those."""
    texts = prose()
    train, val = texts[:-200], texts[-200:]
    for split in ("train", "val"):  # `letters` puts the vocabulary there
        make_source(root / split, [[np.zeros(2, np.uint16)]], vocab_size=257, split=split)
    letters(root)
    from data_pipeline.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(root / "train" / "tokenizer.json")
    for split, some in (("train", train), ("val", val)):
        docs = [np.append(ids, 256) for ids in tokenizer.encode_batch(some)]
        make_source(root / split, [docs], vocab_size=257, split=split, block_tokens=4096)
    letters(root)
    return val


def sampled(model: str, prompts: list[str], n: int, seed: int, reference: str = "") -> dict[str, Any]:
    """On a rank: `n` answers of a model to each prompt, and their KL divergence from a reference, in nats an answer."""
    import torch

    from data_pipeline.tokenizer.tokenizer import Tokenizer
    from tests.distributed import tiny_run
    from trainer.checkpoint.find import find_checkpoint
    from trainer.checkpoint.load import SavedWeights, load_weights
    from trainer.inference.sampler import Sampling, sample
    from trainer.model.gpt import GPT
    from trainer.objective.language_model import token_log_p

    with tiny_run.layout() as mesh:
        models = []
        for path in filter(None, (model, reference)):
            checkpoint = find_checkpoint(path)
            gpt = GPT(SavedWeights(checkpoint).cfg, mesh)
            load_weights(checkpoint, gpt, mesh)
            models.append(gpt.requires_grad_(False).eval())
        tokenizer = Tokenizer.load(find_checkpoint(model) / "tokenizer.json")
        known = {tokenizer.encode(c)[0] for c in (*string.printable[:95], "\n")}
        banned = tuple(i for i in range(257) if i not in known)
        ids = [[256, *tokenizer.encode(prompt)] for prompt in prompts for _ in range(n)]
        answers = sample(models[0], ids, Sampling(banned=banned), max_new_tokens=ANSWER, seed=seed, batch_size=512)
        rows = torch.tensor([[*a, *b] for a, b in zip(ids, answers, strict=True)])
        log_p = [token_log_p(gpt, rows[:, :-1], rows[:, 1:])[:, PROMPT:].sum(-1) for gpt in models]
        kl = float((log_p[0] - log_p[-1]).mean())
        return {"texts": [tokenizer.decode(answer) for answer in answers], "kl": kl}


def gold(text: str) -> float:
    return sum(c in "aeiou" for c in text) / ANSWER


def prompts_of(texts: list[str], n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [text[at : at + PROMPT] for text in rng.choices(texts, k=n) for at in [rng.randrange(len(text) - PROMPT)]]


def compared(path: Path, base: Path, texts: list[str], n: int, seed: int) -> Path:
    """Four answers of the base to each of `n` prompts, ranked by gold."""
    prompts = prompts_of(texts, n, seed)
    [found] = run_ranks(1, f"{HERE}:sampled", model=str(base), prompts=prompts, n=4, seed=seed)
    records = []
    for i, prompt in enumerate(prompts):
        answers = found["texts"][4 * i : 4 * i + 4]
        records.append({"prompt": prompt, "responses": answers, "ranks": [-round(ANSWER * gold(a)) for a in answers]})
    return write_lines(path, records)


def best_and_worst(path: Path, ranked: Path) -> Path:
    """The best and the worst answer to each prompt, where they differ in gold."""
    records = []
    for line in ranked.read_text().splitlines():
        record = json.loads(line)
        *_, worst = by_rank = sorted(zip(record["ranks"], record["responses"], strict=True), key=lambda pair: pair[0])
        best = by_rank[0]
        if best[0] < worst[0]:
            records.append({"prompt": record["prompt"], "chosen": best[1], "rejected": worst[1]})
    assert len(records) > len(ranked.read_text().splitlines()) * 0.85
    return write_lines(path, records)


@dataclass(frozen=True)
class Base:
    """A model that has read the prose, and its ranked answers to prompts from texts that it has not read."""

    seed: int
    run: Path
    texts: list[str]
    train: Path
    held_out: Path


@pytest.fixture(scope="module", params=[0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    seed, root = request.param, tmp_path_factory.mktemp("base")
    texts = source(root / "data")
    steps = ("tokens_per_step=2048", "micro_batch_size=32", "max_steps=600", "checkpoint.every_steps=0")
    rate = (*SCHEDULE, "optim.lr=2e-3", "optim.schedule.warmup=50")
    pretrain(root / "run", f"data.path={root / 'data'}", f"seed={seed}", *SIZES, *steps, *rate)
    assert read_journal(root / "run" / "metrics.jsonl")[-1].metrics["val/loss"] < 2.6
    train = compared(root / "train.jsonl", root / "run", texts, 1024, 10 * seed + 1)
    held_out = compared(root / "held_out.jsonl", root / "run", texts, 256, 10 * seed + 2)
    return Base(seed, root / "run", texts, train, held_out)


def tuned(entry: str, run: Path, base: Base, train: Path, held_out: Path, *overrides: str) -> dict[str, float]:
    """The last line of the journal of a tuning by 32 prompts a step."""
    files = (f"init_from={base.run}", f"examples.path={train}", f"held_out.path={held_out}", "examples.template=text")
    rate = ("optim.schedule.kind=linear", "optim.grad_clip=1.0", "batch_size=32", "micro_batch_size=32")
    given = (f"run.dir={run}", f"seed={base.seed}", *SIZES, *SCHEDULE, *files, *rate, "epochs=0", *overrides)
    succeed(launch(entry, [*given, "checkpoint.every_steps=0"]))
    return read_journal(run / "metrics.jsonl")[-1].metrics


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_reward_model_tells_which_answer_is_better(base: Base, tmp_path: Path) -> None:
    """Accuracy on the pairs of 256 prompts: 0.95 is the bound of the same setting in plain torch."""
    rate = ("optim.lr=1e-3", "optim.schedule.warmup=1", "max_steps=96")
    found = tuned("reward", tmp_path / "run", base, base.train, base.held_out, *rate)
    print(json.dumps({"seed": base.seed, **{k: v for k, v in found.items() if k.startswith(("val/", "reward/"))}}))
    assert found["val/accuracy"] >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_preferences_are_reached_near_the_base(base: Base, tmp_path: Path) -> None:
    """The bounds are those of the same setting in plain torch, six runs of it."""
    pairs = (best_and_worst(tmp_path / f"{path.stem}.jsonl", path) for path in (base.train, base.held_out))
    rate = ("beta=0.5", "optim.lr=1e-4", "optim.schedule.warmup=5", "max_steps=64")
    accuracy = tuned("dpo", tmp_path / "run", base, *pairs, *rate)["val/accuracy"]
    asked: dict[str, Any] = {"prompts": prompts_of(base.texts, 512, 10 * base.seed + 3), "n": 1, "seed": base.seed}
    [before] = run_ranks(1, f"{HERE}:sampled", model=str(base.run), **asked)
    [after] = run_ranks(1, f"{HERE}:sampled", model=str(tmp_path / "run"), reference=str(base.run), **asked)
    golds = [float(np.mean([gold(text) for text in found["texts"]])) for found in (before, after)]
    print(json.dumps({"seed": base.seed, "accuracy": accuracy, "gold": golds, "kl": after["kl"]}))
    assert golds[0] < 0.31
    assert accuracy >= 0.87 and golds[1] >= 0.37 and 0 < after["kl"] < 11

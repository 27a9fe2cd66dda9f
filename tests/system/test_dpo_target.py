"""Direct preference optimisation reaches what plain torch reached: more vowels, near the model that it began with."""

from __future__ import annotations

import contextlib
import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.corpus import pydocs
from tests.helpers.chat import write_lines
from tests.helpers.fixtures import make_source
from tests.helpers.ranks import run_ranks
from tests.system.runs import letters, pretrain
from tests.system.test_dpo import dpo
from trainer.run.journal import read_journal

HERE = "tests.system.test_dpo_target"
PROMPT = ANSWER = 16  # letters
N_CTX = 64


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
    """The best and the worst by gold of four answers of the base to each of `n` prompts."""
    prompts = prompts_of(texts, n, seed)
    [found] = run_ranks(1, f"{HERE}:sampled", model=str(base), prompts=prompts, n=4, seed=seed)
    records = []
    for i, prompt in enumerate(prompts):
        *_, best = ranked = sorted(found["texts"][4 * i : 4 * i + 4], key=gold)
        if gold(best) > gold(ranked[0]):
            records.append({"prompt": prompt, "chosen": best, "rejected": ranked[0]})
    return write_lines(path, records)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_preferences_are_reached_near_the_base(seed: int, tmp_path: Path) -> None:
    """The bounds are those of the same setting in plain torch, six runs of it."""
    texts = source(tmp_path / "data")
    base, run = tmp_path / "base", tmp_path / "run"
    seeds = [10 * seed + k for k in (1, 2, 3)]
    sizes = (f"seed={seed}", "model=test", "model.vocab_size=257", "precision=fp32", "tracking=none")
    schedule = ("optim.weight_decay=0", "optim.schedule.floor=0.1")
    steps = ("tokens_per_step=2048", "micro_batch_size=32", "max_steps=600", "checkpoint.every_steps=0")
    pretrain(
        base, f"data.path={tmp_path / 'data'}", *sizes, *steps, *schedule, "optim.lr=2e-3", "optim.schedule.warmup=50"
    )
    assert read_journal(base / "metrics.jsonl")[-1].metrics["val/loss"] < 2.6
    train = compared(tmp_path / "train.jsonl", base, texts, 1024, seeds[0])
    held_out = compared(tmp_path / "held_out.jsonl", base, texts, 256, seeds[1])
    assert len(train.read_text().splitlines()) > 900
    dpo(
        run,
        f"seed={seed}",
        "precision=fp32",
        *schedule,
        f"init_from={base}",
        f"examples.path={train}",
        f"held_out.path={held_out}",
        "examples.template=text",
        "beta=0.5",
        "optim.lr=1e-4",
        "optim.schedule.kind=linear",
        "optim.schedule.warmup=5",
        "optim.grad_clip=1.0",
        "batch_size=32",
        "micro_batch_size=32",
        "max_steps=64",
        "checkpoint.every_steps=0",
    )
    accuracy = read_journal(run / "metrics.jsonl")[-1].metrics["val/accuracy"]
    asked: dict[str, Any] = {"prompts": prompts_of(texts, 512, seeds[2]), "n": 1, "seed": seeds[2]}
    [before] = run_ranks(1, f"{HERE}:sampled", model=str(base), **asked)
    [after] = run_ranks(1, f"{HERE}:sampled", model=str(run), reference=str(base), **asked)
    golds = [float(np.mean([gold(text) for text in found["texts"]])) for found in (before, after)]
    print(json.dumps({"accuracy": accuracy, "gold": golds, "kl": after["kl"]}))
    assert golds[0] < 0.31
    assert accuracy >= 0.87 and golds[1] >= 0.37 and 0 < after["kl"] < 11

"""Fine-tuning as a user starts it: a planted task is learnt, a kill changes nothing, sentence polarity is reached."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import TOKENIZER, read_manifest, write_manifest
from data_pipeline.tokenizer.tokenizer import Tokenizer, train_bpe
from tests.helpers.chat import write_lines
from tests.helpers.fixtures import make_source
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from tests.system.runs import pretrain
from tests.system.tunings import launch, small_base, succeed
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal

POLARITY = ROOT.parent / "shared/data/finetune/classification/sentence_polarity.zip"
TUNE = (
    "model=test",
    "model.vocab_size=257",
    "optim=small",
    "optim.schedule.warmup=1",
    "precision=fp32",
    "tracking=none",
    "epochs=0",
    "batch_size=8",
    "micro_batch_size=2",
    "checkpoint.every_steps=4",
    "held_out.fraction=0.3",
    "examples.task=classification",
    "examples.texts=[text]",
    "examples.classes=[none,plus]",
)


def finetune(run_dir: Path, *overrides: str, timeout_s: float = 800) -> None:
    succeed(launch("finetune", [f"run.dir={run_dir}", *TUNE, *overrides]), timeout_s)


def plus_signs(path: Path, n: int, seed: int) -> Path:
    """Texts of letters; in those of the class `plus` every other letter, on average, is a plus sign."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        signs, text = rng.random() < 0.5, rng.choices("abcdefgh", k=rng.randint(6, 20))
        for i in rng.sample(range(len(text)), len(text) // 2 if signs else 0):
            text[i] = "+"
        rows.append({"text": "".join(text), "label": "plus" if signs else "none"})
    return write_lines(path, rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base"), steps=1)


def test_a_planted_task_is_learnt_and_scored(base: Path, tmp_path: Path) -> None:
    """The last checkpoint has the special tokens' rows and the head, the run's folder a picture."""
    run = tmp_path / "run"
    examples = f"examples.path={plus_signs(tmp_path / 'a.jsonl', 150, seeded())}"
    finetune(run, f"init_from={base}", examples, "max_steps=60", "batch_size=16", "micro_batch_size=16")
    rows = read_journal(run / "metrics.jsonl")
    last = rows[-1].metrics
    assert {"train/loss/label", "train/loss/lm", "train/acc", "data/epoch"} <= rows[0].metrics.keys()
    assert last["task/held_out/acc"] == last["val/acc"] >= 0.9
    assert last["task/held_out/matthews"] >= 0.75 and last["task/held_out/n"] > 25
    assert rows[0].metrics["train/loss"] == pytest.approx(
        rows[0].metrics["train/loss/label"] + 0.5 * rows[0].metrics["train/loss/lm"], rel=1e-5
    )
    assert (run / "plots/confusion.png").read_bytes().startswith(b"\x89PNG")
    latest = RunFolder(run).latest()
    assert latest is not None and Tokenizer.load(latest / TOKENIZER).special_ids.keys() >= {"<|start|>", "<|extract|>"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not POLARITY.is_file(), reason="sentence polarity is not in ../shared")
def test_sentence_polarity_is_learnt(tmp_path: Path) -> None:
    """Accuracy on 1,066 held-out sentences: 0.65 after one epoch, 0.68 after two; about 6 minutes on one core."""
    texts, labels = sentences()
    order = random.Random(0).sample(range(len(texts)), len(texts))
    train, held_out = order[:-1066], order[-1066:]
    for name, some in (("train", train), ("held_out", held_out)):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": texts[i], "label": labels[i]} for i in some])
    run = pretrained(tmp_path, [texts[i] for i in train])
    common = (
        *("model.n_embd=96", "model.vocab_size=4096", "model.dropout=0.1", "optim=finetune", "optim.lr=5e-4"),
        *("optim.schedule.warmup=0", "warmup_share=0.002", f"examples.path={tmp_path / 'train.jsonl'}"),
        *("batch_size=32", "micro_batch_size=32", "checkpoint.every_steps=1000", "checkpoint.keep_best=false"),
        *("held_out.fraction=0", f"held_out.path={tmp_path / 'held_out.jsonl'}", "examples.classes=[neg,pos]"),
    )
    tuned = tmp_path / "tuned"
    finetune(tuned, f"init_from={run}", *common, "epochs=2", "held_out.every=300", timeout_s=1200)
    rows = [row.metrics for row in read_journal(tuned / "metrics.jsonl")]
    found = [metrics["task/held_out/acc"] for metrics in rows if "task/held_out/acc" in metrics]
    assert found[0] >= 0.65 and found[-1] >= 0.68, found


def sentences() -> tuple[list[str], list[str]]:
    texts, labels = list[str](), list[str]()
    with zipfile.ZipFile(POLARITY) as archive:
        for label in ("neg", "pos"):
            lines = archive.read(f"sentence_polarity/rt-polarity.{label}").decode("latin-1").strip().split("\n")
            texts += [line.strip() for line in lines]
            labels += [label] * len(lines)
    return texts, labels


def pretrained(root: Path, texts: list[str]) -> Path:
    """A run of 800 steps of 32 windows of these sentences, with a byte-level vocabulary of 4,096."""
    tokenizer = train_bpe(texts, 4096)
    end = tokenizer.special_ids["<|endoftext|>"]
    documents = [np.append(ids, end) for ids in tokenizer.encode_batch(texts)]
    for split, some in (("train", documents[100:]), ("val", documents[:100])):
        make_source(root / "data" / split, [some], vocab_size=4096, split=split)
        (root / "data" / split / TOKENIZER).write_bytes(tokenizer.raw)
        manifest = read_manifest(root / "data" / split)
        sha256 = hashlib.sha256(tokenizer.raw).hexdigest()
        write_manifest(dataclasses.replace(manifest, tokenizer_sha256=sha256, eot_id=end))
    pretrain(
        root / "pretrained",
        *(f"data.path={root / 'data'}", "model.n_embd=96", "model.vocab_size=4096", "model.dropout=0.1"),
        *("tokens_per_step=2048", "micro_batch_size=32", "optim.lr=1e-3", "optim.schedule.kind=linear"),
        *("optim.schedule.warmup=100", "optim.beta2=0.999", "optim.weight_decay=0.01", "max_steps=800"),
        "checkpoint.every_steps=1000",
        timeout_s=1200,
    )
    return root / "pretrained"

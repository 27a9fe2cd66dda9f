"""A model of 120,000 parameters that has read Python's own prose as bytes: what the tests of tuning start from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.vocabularies import EOT, byte_level
from tests.helpers.ranks import ROOT
from tests.system.runs import pretrain

MODEL = ("model=test", "model.vocab_size=257")
STEPS = 600


def byte_vocabulary(folder: Path) -> Path:
    """A folder with a vocabulary of the 256 bytes, and the end of a text as the last id."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True)
    raw = byte_level({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))} | {EOT: 256}, [])
    (folder / TOKENIZER).write_bytes(raw)
    return folder


def prose_base(root: Path, *overrides: str, steps: int = STEPS) -> Path:
    """The folder of the run that trained it: 32 windows of 64 bytes a step."""
    write = ["corpus=pydocs", f"tokenizer={byte_vocabulary(root / 'bytes')}", f"output={root / 'shards'}"]
    argv = [sys.executable, "-m", "data_pipeline.shards", "write", *write, "val_fraction=0.02"]
    subprocess.run(argv, check=True, capture_output=True, cwd=ROOT, timeout=300)
    rate = ("optim.lr=2e-3", "optim.schedule.warmup=50", "optim.weight_decay=0", "log_every=100")
    size = (f"data.path={root / 'shards'}", "data.lanes=32", "tokens_per_step=2048", "micro_batch_size=32")
    pretrain(root / "base", *MODEL, *size, *rate, f"max_steps={steps}", "checkpoint.every_steps=0", *overrides)
    return root / "base"

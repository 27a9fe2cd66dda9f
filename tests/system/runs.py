"""Whole runs of the real entry, as a user starts them: a tiny model on a small source, one or more gloo ranks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.manifest import TOKENIZER, read_manifest, write_manifest
from data_pipeline.tokenizer.vocabularies import EOT, byte_level
from tests.helpers.fixtures import make_source
from tests.helpers.ranks import Process, free_port, rank_env, run_ranks, start_module
from trainer.run.journal import read_journal

TINY = (
    "model=test",
    "optim=small",
    "data.lanes=4",
    "tokens_per_step=512",
    "micro_batch_size=2",
    "precision=fp32",
    "eval.every=0",
    "eval.windows=8",
    "checkpoint.every_steps=4",
    "optim.schedule.warmup=1",
    "tracking=none",
)


def make_data(root: Path, vocab_size: int = 1024) -> Path:
    """A folder with train/ and val/: three uneven shards of documents whose next token can be learnt."""
    rng = np.random.default_rng(0)

    def documents(n: int) -> list[np.ndarray]:
        return [np.cumsum(rng.integers(0, 3, size=rng.integers(50, 300))) % vocab_size for _ in range(n)]

    make_source(root / "train", [documents(n) for n in (40, 25, 7)], vocab_size=vocab_size)
    make_source(root / "val", [documents(8)], vocab_size=vocab_size, split="val")
    return root


def letters(root: Path) -> Path:
    """The same sources with a vocabulary that encodes: bytes, and the end of a text as the last id."""
    from tokenizers.pre_tokenizers import ByteLevel

    raw = byte_level({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))} | {EOT: 256}, [])
    for split in ("train", "val"):
        manifest = read_manifest(root / split)
        (root / split / TOKENIZER).write_bytes(raw)
        write_manifest(replace(manifest, tokenizer_sha256=hashlib.sha256(raw).hexdigest(), eot_id=256))
    return root


def start(
    run_dir: Path, *overrides: str, ranks: int = 1, device: str = "cpu", entry: str = "trainer.pretrain"
) -> list[Process]:
    """`python -m trainer.pretrain` on each rank, as torchrun would start it; stderr is kept."""
    port, argv = free_port(), [*TINY, f"run.dir={run_dir}", *overrides]
    return [start_module(entry, argv, rank_env(r, ranks, port, device), device) for r in range(ranks)]


def finish(processes: list[Process], timeout_s: float = 800) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank."""
    try:
        return [(p.returncode, err) for p in processes for _, err in [p.communicate(timeout=timeout_s)]]
    finally:
        for p in processes:
            p.kill()


def pretrain(run_dir: Path, *overrides: str, ranks: int = 1, device: str = "cpu", timeout_s: float = 800) -> None:
    ended = finish(start(run_dir, *overrides, ranks=ranks, device=device), timeout_s)
    assert all(code == 0 for code, _ in ended), "\n".join(err[-3000:] for _, err in ended)


def told(run_dir: Path, *overrides: str) -> list[str]:
    """The lines that a run of one rank prints."""
    [text] = run_ranks(1, "tests.system.runs:printed", argv=[*TINY, f"run.dir={run_dir}", *overrides])
    return [line.strip() for line in text.splitlines()]


def printed(argv: list[str]) -> str:
    """On a rank: the text that `python -m trainer.pretrain ARGV...` prints."""
    sys.argv = ["trainer.pretrain", *argv]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module("trainer.pretrain", run_name="__main__", alter_sys=True)
    return out.getvalue()


def kill_at(processes: list[Process], journal: Path, step: int, rank: int, timeout_s: float = 800) -> int:
    """SIGKILL one rank once `step` is logged; the others end by themselves. Returns the last step logged."""
    deadline = time.monotonic() + timeout_s
    try:
        while not (journal.exists() and any(row.step >= step for row in read_journal(journal))):
            dead = [p for p in processes if p.poll() is not None]
            assert not dead, f"a rank ended before step {step}: {dead[0].communicate()[1][-3000:]}"
            assert time.monotonic() < deadline, f"step {step} was not reached in {timeout_s} s"
            time.sleep(0.005)
        processes[rank].kill()
        finish(processes)
    finally:  # none may live on into the next test
        for p in processes:
            p.kill()
    return read_journal(journal)[-1].step

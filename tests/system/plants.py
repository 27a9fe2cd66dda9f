"""A source that is easy to learn, but for the windows of some steps of a run: these are noise, or carry a marker.

Where a step's windows lie hangs on the shards' lengths, the seed and the ledger alone, so the tokens can be written
once the order is known: real data, which the loss of a model that has learnt the rest jumps at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.helpers.fixtures import make_source
from tests.system.runs import TINY
from trainer.config.pretrain import PretrainConfig

VOCAB, MARKER, SHARDS = 1024, 1023, (12000, 9000, 11000)  # tokens; 498 windows of 64, 62 steps of 8


def make_plants(
    root: Path, plants: Mapping[int, str], seed: int, *overrides: str, tokens: Sequence[int] = SHARDS
) -> Path:
    """A folder with train/ and val/. `plants`: what the windows of a step are, "noise" or "marker"; `tokens`: of each
    shard."""
    rng = np.random.default_rng(seed)
    shards = [np.cumsum(rng.integers(1, 3, size=n)) % 16 for n in tokens]
    make_source(root / "val", [[np.cumsum(rng.integers(1, 3, size=600)) % 16]], vocab_size=VOCAB, split="val")
    _write(root / "train", shards)
    for step, kind in plants.items():
        for shard, start in windows_of(root, step, *overrides):
            shards[shard][start : start + 64] = rng.integers(0, MARKER, size=64) if kind == "noise" else MARKER
    _write(root / "train", shards)
    return root


def windows_of(root: Path, step: int, *overrides: str) -> list[tuple[int, int]]:
    """(shard, first token) of each window that an undisturbed run takes in `step`."""
    from conf.schema import load
    from trainer.check import Checked
    from trainer.data.sources import open_sources

    cfg = load(PretrainConfig, [*TINY, "run.dir=none", f"data.path={root}", *overrides])
    _, windows = Checked(cfg, open_sources(cfg.data), {}, "").plan({}).step(step)
    return list(zip(windows.shard.tolist(), windows.start.tolist(), strict=True))


def _write(root: Path, shards: Iterable[np.ndarray]) -> None:
    make_source(root, [np.split(tokens, range(100, len(tokens), 100)) for tokens in shards], vocab_size=VOCAB)

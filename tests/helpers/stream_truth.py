"""What a run must have been fed, byte for byte: windows dealt by hand, cut from shards read by tarfile and np.load."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.order_twin import Leg, Window, deal


def shards_of(folder: Path) -> list[np.ndarray]:
    """The tokens of each shard of a source's split, [tokens] each."""
    out = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            blocks = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".npy")]  # type: ignore[union-attr]
        out.append(np.concatenate([np.empty(0, "<u2"), *blocks]).astype("<u2"))
    return out


def legs_of(ledger: Iterable[Mapping[str, Any]]) -> list[Leg]:
    """The ledger of a checkpoint's state.json, in the twin's words."""
    return [Leg(*(segment[field] for field in Leg._fields)) for segment in ledger]


class Truth:
    """The tokens of each step's windows.

    Args:
        shards: of each source, the tokens of each shard.
    """

    def __init__(
        self, shards: Mapping[str, Sequence[np.ndarray]], legs: Sequence[Leg], *, lanes: int, seed: int, steps: int
    ) -> None:
        self.legs, self.lanes = list(legs), lanes
        self._shards = [shards[name] for name in sorted(shards)]
        tokens = {name: [len(shard) for shard in of] for name, of in shards.items()}
        self.windows, self.taken = deal(tokens, legs, lanes=lanes, seed=seed, steps=steps)

    def rows_of(self, step: int, rank: int, dp: int) -> list[int]:
        """Which rows of the step's global batch a rank is fed."""
        own = range(rank * self.lanes // dp, (rank + 1) * self.lanes // dp)
        return [row for row, p in enumerate(self.taken[step]) if p % self.lanes in own]

    def windows_of(self, step: int) -> list[Window]:
        return [self.windows[p] for p in self.taken[step]]

    def batch(self, step: int) -> np.ndarray:
        """The step's global batch: [windows, n_ctx + 1]."""
        n_ctx = next(leg.n_ctx for leg in reversed(self.legs) if leg.step <= step)
        return np.stack([self._shards[s][k][at : at + n_ctx + 1] for s, k, at in self.windows_of(step)])

    def fed(self, step: int, rank: int, dp: int) -> np.ndarray:
        """What one rank is fed in a step: [windows / dp, n_ctx + 1]."""
        return self.batch(step)[self.rows_of(step, rank, dp)]

    def crc32(self, step: int, rank: int, dp: int) -> int:
        return zlib.crc32(self.fed(step, rank, dp).tobytes())

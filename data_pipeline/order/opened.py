"""The order of a run or of a config, with the manifests of its sources. Reads manifests and indexes, no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from conf.errors import UserError
from data_pipeline.config import DataConfig, OrderConfig
from data_pipeline.files import from_json, read_json
from data_pipeline.manifest import Manifest
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import plan_ledger
from data_pipeline.remote.mirror import NoSource
from data_pipeline.remote.source import index_at, open_cache, open_source

_STATE = "state.json"
_CURE = "use another checkpoint"


@dataclass(frozen=True)
class _Source:
    """A source as a checkpoint names it: its folder or URL, and the hash of its shards."""

    path: str
    sha256: str


@dataclass(frozen=True)
class _Data:
    """The part of a checkpoint's state that decides the order."""

    sources: dict[str, _Source]
    lanes: Annotated[int, range(1, 1 << 31)]
    seed: int
    ledger: Any


@dataclass(frozen=True)
class _State:
    step: Annotated[int, range(1 << 53)]
    data: _Data


class OpenedOrder:
    """The order of a run, or the one that a config gives.

    Args:
        data: names the cache.
        paths: the folder or URL of each source's train split.
        done: steps that the run has made; None for a config.
        sha256: the hash that each source's manifest must have, if the run has recorded it.

    Raises:
        UserError: a source that is missing and still drawn, or whose shards are not those of the run.
    """

    def __init__(
        self,
        data: DataConfig,
        paths: dict[str, str],
        ledger: Ledger,
        *,
        lanes: int,
        seed: int,
        done: int | None = None,
        sha256: dict[str, str] | None = None,
    ) -> None:
        self.done = done
        self.cache = open_cache(data)
        self.manifests: dict[str, Manifest] = {}
        for name, path in paths.items():
            try:
                manifest = self.manifests[name] = open_source(path, self.cache)
            except NoSource:
                if ledger.segments[-1].weights.get(name) or done is None:  # else the run continues without it
                    raise
                continue
            expected = (sha256 or {}).get(name, manifest.sha256)
            if manifest.sha256 != expected:
                raise UserError(
                    f"{path}: shards of sha256 {manifest.sha256}, the run was trained on {expected}: put them back"
                )
        tokens = {name: [shard.tokens for shard in m.shards] for name, m in self.manifests.items()}
        self.plan = Plan(tokens, ledger, lanes=lanes, seed=seed)
        in_use = 2 * lanes * len(self.manifests)  # a lane is in one shard of each source, now and then between two
        self.documents = lru_cache(maxsize=max(256, in_use))(self._documents)

    def _documents(self, name: str, shard: int) -> tuple[tuple[str, ...], np.ndarray]:
        """The document ids of a shard, and the end of each in its tokens."""
        index = index_at(self.manifests[name], shard, self.cache)
        return index.document_ids, np.cumsum(index.document_tokens)


def order_of_config(cfg: OrderConfig) -> OpenedOrder:
    """The order that a run of this config would have."""
    paths = {name: cfg.data.location(name, "train") for name in cfg.data.sources}
    ledger = plan_ledger(cfg.data, n_ctx=cfg.n_ctx, tokens_per_step=cfg.tokens_per_step, ramp=cfg.batch_ramp)
    return OpenedOrder(cfg.data, paths, ledger, lanes=cfg.data.lanes, seed=cfg.seed)


def order_of_run(cfg: OrderConfig, folder: Path) -> OpenedOrder:
    """The order of a run (its latest checkpoint), or of one checkpoint; its sources are at the paths that it names."""
    path = _checkpoint(folder) / _STATE
    state = from_json(_State, read_json(path, _CURE), path, _CURE, extra=True)
    data = state.data
    paths = {name: source.path for name, source in data.sources.items()}
    sha256 = {name: source.sha256 for name, source in data.sources.items()}
    ledger = Ledger.from_json(data.ledger)
    return OpenedOrder(cfg.data, paths, ledger, lanes=data.lanes, seed=data.seed, done=state.step, sha256=sha256)


def _checkpoint(folder: Path) -> Path:
    """The latest checkpoint of a run's folder, or the folder itself if it is a checkpoint."""
    pointer = folder / "checkpoints" / "latest"
    if pointer.is_file():
        name = pointer.read_text(encoding="ascii", errors="replace").strip()
        checkpoint = pointer.parent / name
        if Path(name).name == name and (checkpoint / _STATE).is_file():
            return checkpoint
        raise UserError(f"{pointer} names {name!r}, which is not there: give one that is, checkpoint=DIR")
    if not (folder / _STATE).is_file():
        raise UserError(
            f"checkpoint={folder}: holds no checkpoint (yet): give a run's folder, or one of its checkpoints"
        )
    return folder

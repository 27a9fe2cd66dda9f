"""Entry: which windows, and which documents in them, a step is made of. Reads manifests and indexes, no tokens.

    python -m data_pipeline.order data.path=FOLDER steps=1000:1002 dp=8 rank=3 json=true
    python -m data_pipeline.order data.path=FOLDER steps=0:5000 find=DOCUMENT
    python -m data_pipeline.order checkpoint=RUN_DIR steps=90:100

A line for each window: step, index in the step's global batch, source, shard, and spans: the documents' ids, each with
the part [start, end) of the document's tokens that is in the window (its n_ctx inputs and the last label). With find=
only the windows that hold that document, and on stderr how often it was seen.

Of a run, the ledger of its latest checkpoint (or of the checkpoint named) is asked. For steps that it had not made by
then the answer is its plan: a shard that is lost later, or another config, changes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.config import DataConfig, OrderConfig
from data_pipeline.files import from_json, read_json
from data_pipeline.manifest import Manifest
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import plan_ledger
from data_pipeline.remote.cached_shard import NoSource
from data_pipeline.remote.source import index_at, open_cache, open_source

_STATE = "state.json"
_CURE = "use another checkpoint"
_MOST = 1 << 53  # positions; what is counted from them stays far from 64 bits


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


class Place(NamedTuple):
    """A document: the tokens [start, stop) of a shard."""

    source: str
    shard: int
    start: int
    stop: int


class Asked:
    """The order in question: a run's, or the one that a config would give. `done`: steps that a run has made.

    `paths` are the sources' places, `sha256` what their manifests must be, where that is known.
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
        self.done, self.cache = done, open_cache(data)
        manifests: dict[str, Manifest] = {}
        self.manifests = manifests
        for name, path in paths.items():
            try:
                manifests[name] = open_source(path, self.cache)
            except NoSource:
                if ledger.segments[-1].weights.get(name) or done is None:  # else the run goes on without it
                    raise
        for name, expected in (sha256 or {}).items():
            if name in manifests and manifests[name].sha256 != expected:
                raise UserError(
                    f"{paths[name]}: shards of sha256 {manifests[name].sha256}, the run was trained on {expected}: "
                    "put them back"
                )
        tokens = {name: [shard.tokens for shard in m.shards] for name, m in manifests.items()}
        self.plan = Plan(tokens, ledger, lanes=lanes, seed=seed)
        at_once = 2 * lanes * len(manifests)  # a lane is in one shard of each source, and now and then between two
        self.documents = lru_cache(maxsize=max(256, at_once))(self._documents)

    def _documents(self, name: str, shard: int) -> tuple[tuple[str, ...], np.ndarray]:
        """A shard's document ids, and where each ends."""
        index = index_at(self.manifests[name], shard, self.cache)
        return index.document_ids, np.cumsum(index.document_tokens)


def order(cfg: OrderConfig) -> None:
    """Print the lines that are asked for.

    Raises:
        UserError: no such run, source, document or step.
    """
    asked = _of_run(cfg, cfg.checkpoint) if cfg.checkpoint is not None else _of_config(cfg)
    steps = cfg.step_range
    if steps is None:
        steps = range(asked.done) if cfg.find is not None and asked.done is not None else range(1)
    lanes, end = asked.plan.lanes, asked.plan.ledger.position(steps.stop)
    if lanes % cfg.dp:
        fit = ", ".join(str(dp) for dp in range(1, lanes + 1) if lanes % dp == 0)
        raise UserError(f"dp={cfg.dp} does not divide data.lanes={lanes}: give one of dp={fit}")
    if end > _MOST:
        raise UserError(f"steps={cfg.steps} end at window {end}, at most {_MOST} are counted: give earlier steps")
    for line in _steps(cfg, asked, steps) if cfg.find is None else _found(cfg, asked, steps, cfg.find):
        try:
            print(json.dumps(line) if cfg.json else _text(line))
        except BrokenPipeError:
            return _hang_up()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _hang_up()


def _hang_up() -> None:
    """The reader, head for one, has seen enough: what Python flushes at its end goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _text(line: dict[str, Any]) -> str:
    def shown(name: str) -> str:
        return name if name.isprintable() else json.dumps(name)

    spans = ", ".join(f"{shown(name)} [{start}:{end}]" for name, start, end in line["spans"])
    return f"step {line['step']} index {line['index']}: {line['source']}/{line['shard']}: {spans}"


def _of_config(cfg: OrderConfig) -> Asked:
    paths = {name: cfg.data.where(name, "train") for name in cfg.data.sources}
    ledger = plan_ledger(cfg.data, n_ctx=cfg.n_ctx, tokens_per_step=cfg.tokens_per_step, ramp=cfg.batch_ramp)
    return Asked(cfg.data, paths, ledger, lanes=cfg.data.lanes, seed=cfg.seed)


def _of_run(cfg: OrderConfig, where: str) -> Asked:
    """The order of a run (its latest checkpoint), or of one checkpoint; its sources are where they were."""
    path = _checkpoint(Path(where)) / _STATE
    state = from_json(_State, read_json(path, _CURE), path, _CURE, extra=True)
    data = state.data
    paths = {name: source.path for name, source in data.sources.items()}
    sha256 = {name: source.sha256 for name, source in data.sources.items()}
    ledger = Ledger.from_json(data.ledger)
    return Asked(cfg.data, paths, ledger, lanes=data.lanes, seed=data.seed, done=state.step, sha256=sha256)


def _checkpoint(folder: Path) -> Path:
    """The latest checkpoint of a run's folder, or the folder where it is a checkpoint."""
    pointer = folder / "checkpoints" / "latest"
    if pointer.is_file():
        name = pointer.read_text(encoding="ascii", errors="replace").strip()
        found = pointer.parent / name
        if Path(name).name == name and (found / _STATE).is_file():
            return found
        raise UserError(f"{pointer} names {name!r}, which is not there: give one that is, checkpoint=DIR")
    if not (folder / _STATE).is_file():
        raise UserError(
            f"checkpoint={folder}: holds no checkpoint (yet): give a run's folder, or one of its checkpoints"
        )
    return folder


def _steps(cfg: OrderConfig, asked: Asked, steps: range) -> Iterator[dict[str, Any]]:
    for step in steps:
        for rank in range(cfg.dp) if cfg.rank is None else (cfg.rank,):
            yield from _lines(asked, asked.plan.positions(step, rank, cfg.dp))


def _found(cfg: OrderConfig, asked: Asked, steps: range, document: str) -> Iterator[dict[str, Any]]:
    """The windows that held a document; what there is to say of it goes to stderr."""
    plan, ledger = asked.plan, asked.plan.ledger
    places = list(_places(asked, document))
    if not places:
        count = sum(m.documents for m in asked.manifests.values())
        raise UserError(f"find={document}: none of the {count} documents in {', '.join(asked.manifests)} has this id")
    until = ledger.position(steps.stop)
    found = [plan.positions_of(*place, until) for place in places if place.start < place.stop]
    positions = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
    if cfg.rank is not None:
        positions = positions[positions % plan.lanes // (plan.lanes // cfg.dp) == cfg.rank]
    kept = [p for p in positions.tolist() if ledger.step_of(p) in steps]  # None: jumped over
    for _, same in groupby(kept, key=ledger.number_at):
        yield from _lines(asked, np.fromiter(same, np.int64))
    seen = f"{len(kept)} windows of {len({ledger.step_of(p) for p in kept})} steps" if kept else "in no window"
    of = "" if cfg.rank is None else f" of rank {cfg.rank} of {cfg.dp}"
    among = f"of the steps {steps.start} to {steps.stop - 1}" if steps else "for the run has made no step"
    print(f"find={document}: {seen}, {among}{of}", file=sys.stderr)
    for place in places:
        print(f"  {_whereabouts(asked, steps, place, bool(kept))}", file=sys.stderr)


def _whereabouts(asked: Asked, steps: range, place: Place, seen: bool) -> str:
    """Where a document lies, and what is known of why it was not seen."""
    name, number, start, stop = place
    shard, ledger = asked.manifests[name].shards[number], asked.plan.ledger
    where = f"in {name}/{shard.name}: tokens {start} to {stop - 1} of {shard.tokens}"
    if start == stop:
        return f"in {name}/{shard.name}: it has no token"
    lengths = {s.n_ctx for s in ledger.segments if s.step < steps.stop}
    if not seen and len(lengths) == 1:
        [n_ctx] = lengths
        if not shard.windows(n_ctx) or start > shard.windows(n_ctx) * n_ctx:
            where += f", in a tail too short for a window of n_ctx={n_ctx}"
    if number in ledger.segment(max(steps.stop - 1, 0)).lost.get(name, ()):
        where += ", a shard that is lost by then"
    return where


def _places(asked: Asked, document: str) -> Iterator[Place]:
    """Every document of this id."""
    from tqdm import tqdm

    shards = [(name, m, n) for name, m in asked.manifests.items() for n in range(len(m.shards))]
    for name, manifest, number in tqdm(shards, unit="index", mininterval=1.0, disable=None, leave=False):
        index = index_at(manifest, number, asked.cache)
        if document in index.document_ids:
            for n in (n for n, found in enumerate(index.document_ids) if found == document):
                start = sum(index.document_tokens[:n])
                yield Place(name, number, start, start + index.document_tokens[n])


def _lines(asked: Asked, positions: np.ndarray) -> Iterator[dict[str, Any]]:
    """A line for each of some positions, [n], which lie in one segment of the ledger."""
    plan = asked.plan
    here = plan.ledger.segments[plan.ledger.number_at(int(positions[0]))]
    windows = plan.windows_at(positions)
    for position, source, shard, start in zip(positions.tolist(), *(part.tolist() for part in windows), strict=True):
        name = plan.names[source]
        steps, index = divmod(position - here.position, here.windows_per_step)
        yield {
            "step": here.step + steps,
            "index": index,
            "source": name,
            "shard": asked.manifests[name].shards[shard].name,
            "spans": _spans(*asked.documents(name, shard), start, start + here.n_ctx + 1),
        }


def _spans(ids: tuple[str, ...], ends: np.ndarray, start: int, stop: int) -> list[tuple[str, int, int]]:
    """The documents in a shard's tokens [start, stop): id, and which of its own tokens, [from, to), are there."""
    first, last = np.searchsorted(ends, (start, stop - 1), side="right").tolist()
    begins = [int(ends[first - 1]) if first else 0, *ends[first:last].tolist()]
    spans = zip(ids[first : last + 1], begins, ends[first : last + 1].tolist(), strict=True)
    return [(name, max(start - at, 0), min(stop, end) - at) for name, at, end in spans if end > at]

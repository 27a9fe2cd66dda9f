"""Entry: the windows of a step and the documents in them. Reads manifests and indexes, no tokens.

    python -m data_pipeline.order data.path=FOLDER steps=1000:1002 dp=8 rank=3 json=true
    python -m data_pipeline.order data.path=FOLDER steps=0:5000 find=DOCUMENT
    python -m data_pipeline.order checkpoint=RUN_DIR steps=90:100

Prints a line for each window: step, index in the step's global batch, source, shard, and spans: the documents' ids,
each with the part [start, end) of the document's tokens that is in the window (its n_ctx inputs and the last label).
With find= it prints only the windows that hold that document, and on stderr how often the run has seen it.

For a run, the answer comes from the ledger of its latest checkpoint, or of the checkpoint named. For later steps it is
the run's plan: a shard that is lost later, or another config, changes it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.config import OrderConfig
from data_pipeline.order.opened import OpenedOrder, order_of_config, order_of_run
from data_pipeline.remote.source import index_at

_MAX_POSITION = 1 << 53  # counts of tokens stay far from 64 bits


class DocumentSpan(NamedTuple):
    """The tokens [start, stop) of a shard, which are a document."""

    source: str
    shard: int
    start: int
    stop: int


def order(cfg: OrderConfig) -> None:
    """Print the windows of the steps, or those of one document.

    Raises:
        UserError: no such run, source, document or step.
    """
    opened = order_of_config(cfg) if cfg.checkpoint is None else order_of_run(cfg, Path(cfg.checkpoint))
    steps = cfg.step_range
    if steps is None:
        steps = range(opened.done) if cfg.find is not None and opened.done is not None else range(1)
    lanes, end = opened.plan.lanes, opened.plan.ledger.position(steps.stop)
    if lanes % cfg.dp:
        fit = ", ".join(str(dp) for dp in range(1, lanes + 1) if lanes % dp == 0)
        raise UserError(f"dp={cfg.dp} does not divide data.lanes={lanes}: give one of dp={fit}")
    if end > _MAX_POSITION:
        raise UserError(
            f"steps={cfg.steps} end at window {end}, at most {_MAX_POSITION} are counted: give earlier steps"
        )
    lines = _steps(cfg, opened, steps) if cfg.find is None else _holding(cfg, opened, steps, cfg.find)
    try:
        for line in lines:
            print(json.dumps(line) if cfg.json else _text(line))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python must not flush into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _text(line: dict[str, Any]) -> str:
    def shown(name: str) -> str:
        return name if name.isprintable() else json.dumps(name)

    spans = ", ".join(f"{shown(name)} [{start}:{end}]" for name, start, end in line["spans"])
    return f"step {line['step']} index {line['index']}: {line['source']}/{line['shard']}: {spans}"


def _steps(cfg: OrderConfig, opened: OpenedOrder, steps: range) -> Iterator[dict[str, Any]]:
    for step in steps:
        for rank in range(cfg.dp) if cfg.rank is None else (cfg.rank,):
            yield from _lines(opened, opened.plan.positions(step, rank, cfg.dp))


def _holding(cfg: OrderConfig, opened: OpenedOrder, steps: range, document: str) -> Iterator[dict[str, Any]]:
    """The windows that hold a document; a summary goes to stderr."""
    plan, ledger = opened.plan, opened.plan.ledger
    spans = list(_spans_of(opened, document))
    if not spans:
        count = sum(m.documents for m in opened.manifests.values())
        raise UserError(f"find={document}: none of the {count} documents in {', '.join(opened.manifests)} has this id")
    until = ledger.position(steps.stop)
    parts = [plan.positions_of(*span, until) for span in spans if span.start < span.stop]
    positions = np.unique(np.concatenate([np.empty(0, np.int64), *parts]))
    if cfg.rank is not None:
        positions = positions[positions % plan.lanes // (plan.lanes // cfg.dp) == cfg.rank]
    kept = [p for p in positions.tolist() if ledger.step_of(p) in steps]  # None: jumped over
    for _, same in groupby(kept, key=ledger.number_at):
        yield from _lines(opened, np.fromiter(same, np.int64))
    seen = f"{len(kept)} windows of {len({ledger.step_of(p) for p in kept})} steps" if kept else "in no window"
    of = "" if cfg.rank is None else f" of rank {cfg.rank} of {cfg.dp}"
    among = f"of the steps {steps.start} to {steps.stop - 1}" if steps else "for the run has made no step"
    print(f"find={document}: {seen}, {among}{of}", file=sys.stderr)
    for span in spans:
        print(f"  {_location(opened, steps, span, bool(kept))}", file=sys.stderr)


def _location(opened: OpenedOrder, steps: range, span: DocumentSpan, seen: bool) -> str:
    """The shard and tokens of a document, and the known reasons why no window shows it."""
    name, number, start, stop = span
    shard, ledger = opened.manifests[name].shards[number], opened.plan.ledger
    text = f"in {name}/{shard.name}: tokens {start} to {stop - 1} of {shard.tokens}"
    if start == stop:
        return f"in {name}/{shard.name}: it has no token"
    lengths = {s.n_ctx for s in ledger.segments if s.step < steps.stop}
    if not seen and len(lengths) == 1:
        [n_ctx] = lengths
        if not shard.windows(n_ctx) or start > shard.windows(n_ctx) * n_ctx:
            text += f", in a tail too short for a window of n_ctx={n_ctx}"
    if number in ledger.segment(max(steps.stop - 1, 0)).lost.get(name, ()):
        text += ", a shard that is lost by then"
    return text


def _spans_of(opened: OpenedOrder, document: str) -> Iterator[DocumentSpan]:
    """Every document with this id."""
    from tqdm import tqdm

    shards = [(name, m, n) for name, m in opened.manifests.items() for n in range(len(m.shards))]
    for name, manifest, number in tqdm(shards, unit="index", mininterval=1.0, disable=None, leave=False):
        index = index_at(manifest, number, opened.cache)
        if document in index.document_ids:
            for n in (n for n, id_ in enumerate(index.document_ids) if id_ == document):
                start = sum(index.document_tokens[:n])
                yield DocumentSpan(name, number, start, start + index.document_tokens[n])


def _lines(opened: OpenedOrder, positions: np.ndarray) -> Iterator[dict[str, Any]]:
    """A line for each of the positions, [n], all in one segment of the ledger."""
    plan = opened.plan
    segment = plan.ledger.segments[plan.ledger.number_at(int(positions[0]))]
    windows = plan.windows_at(positions)
    for position, source, shard, start in zip(positions.tolist(), *(part.tolist() for part in windows), strict=True):
        name = plan.names[source]
        steps, index = divmod(position - segment.position, segment.windows_per_step)
        yield {
            "step": segment.step + steps,
            "index": index,
            "source": name,
            "shard": opened.manifests[name].shards[shard].name,
            "spans": _spans(*opened.documents(name, shard), start, start + segment.n_ctx + 1),
        }


def _spans(ids: tuple[str, ...], ends: np.ndarray, start: int, stop: int) -> list[tuple[str, int, int]]:
    """The documents in a shard's tokens [start, stop): the id, and the part [from, to) of its own tokens."""
    first, last = np.searchsorted(ends, (start, stop - 1), side="right").tolist()
    begins = [int(ends[first - 1]) if first else 0, *ends[first:last].tolist()]
    spans = zip(ids[first : last + 1], begins, ends[first : last + 1].tolist(), strict=True)
    return [(name, max(start - first, 0), min(stop, end) - first) for name, first, end in spans if end > first]

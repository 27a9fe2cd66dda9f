"""The loaders that are compared. Each serves what nanoGPT's get_batch makes: x and y, int64 [8, 1024].

An engine is a generator of such pairs from step `step` of a shuffled epoch on, and gives the same ones wherever it
starts. The peers are used as their documentation shows, with no worker processes; where there were several ways to the
same batch, the quickest was taken.
"""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.documents import N_CTX, open_flat

BATCH = 8  # windows
SEED = 1729
Batches = Generator[tuple[Tensor, Tensor], None, None]


def ours(folder: Path, step: int) -> Batches:
    """data_pipeline's TrainLoader, alone: one rank that walks 8 lanes and checks every block's checksum."""
    from data_pipeline.manifest import read_manifest
    from data_pipeline.order.ledger import Ledger
    from data_pipeline.order.plan import Plan
    from data_pipeline.stream.loader import TrainLoader
    from data_pipeline.stream.windows import ShardStream

    manifest, lanes = read_manifest(folder), 8
    tokens = {"all": [shard.tokens for shard in manifest.shards]}
    plan = Plan(tokens, Ledger.start(BATCH, N_CTX, {"all": 1}), lanes=lanes, seed=SEED)
    stream = ShardStream([manifest], open_shards=lanes)
    loader = TrainLoader(plan, stream, dp_rank=0, dp=1, micro_batch_size=BATCH, step=step)
    try:
        while True:
            yield from ((batch.tokens, batch.labels) for batch in loader.next())
    finally:
        loader.close()


def memmap(folder: Path, step: int) -> Batches:
    """nanoGPT's way: slices of np.memmap. Each window once in an epoch, where nanoGPT draws offsets at random."""
    data = open_flat(folder)
    starts = np.random.default_rng(SEED).permutation((len(data) - 1) // N_CTX) * N_CTX
    for first in range(step * BATCH, len(starts) - BATCH + 1, BATCH):
        windows = np.stack([data[s : s + N_CTX + 1] for s in starts[first : first + BATCH].tolist()])
        yield _pair(windows)


def memmap_gather(folder: Path, step: int) -> Batches:
    """The same windows, all of a batch gathered by one numpy index: what the machine can do, not what nanoGPT does."""
    data = np.asarray(open_flat(folder))
    windows = np.lib.stride_tricks.sliding_window_view(data, N_CTX + 1)[::N_CTX]
    order = np.random.default_rng(SEED).permutation(len(windows))
    for first in range(step * BATCH, len(order) - BATCH + 1, BATCH):
        yield _pair(windows[order[first : first + BATCH]])


def webdataset(folder: Path, step: int) -> Batches:
    """Tars of documents, shuffled, packed into windows. It has no position: a resume reads and discards."""
    import webdataset as wds

    tars = sorted(map(str, folder.glob("*.tar")))
    random.Random(SEED).shuffle(tars)
    stream = wds.WebDataset(tars, shardshuffle=False).decode().shuffle(1000, rng=random.Random(SEED))
    need = BATCH * N_CTX + 1  # the windows of a batch lie side by side, neighbours share a token
    skip, held, count = step * BATCH * N_CTX, [], 0
    for sample in stream:
        ids = sample["npy"]
        if skip >= len(ids):
            skip -= len(ids)
            continue
        held.append(ids[skip:])
        count += len(ids) - skip
        skip = 0
        if count >= need:
            line = np.concatenate(held)
            at = 0
            while count - at >= need:
                flat = line[at : at + need]
                x, y = flat[:-1].astype(np.int64), flat[1:].astype(np.int64)
                yield torch.from_numpy(x.reshape(BATCH, N_CTX)), torch.from_numpy(y.reshape(BATCH, N_CTX))
                at += need - 1
            held, count = [line[at:]], count - at


def streaming(folder: Path, step: int) -> Batches:
    """mosaicml-streaming on MDS, py1e shuffle (its default); its own state to resume."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=BATCH, num_canonical_nodes=1
    )
    if step:
        state = dataset.state_dict(step * BATCH, from_beginning=True)
        dataset.load_state_dict({**state, "epoch": 0})  # as it was saved within that epoch
    held = []
    for sample in dataset:
        held.append(sample["tokens"])
        if len(held) == BATCH:
            yield _pair(np.stack(held))
            held = []


def _pair(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Windows [n, T + 1] as inputs and labels [n, T], contiguous int64."""
    return torch.from_numpy(windows[:, :-1].astype(np.int64)), torch.from_numpy(windows[:, 1:].astype(np.int64))


def with_peer(folder: str) -> None:
    """Let packages in `folder` be imported, after those that are installed; no text loader needs torchvision."""
    if folder:
        sys.path.append(folder)
        sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")


class Engine(NamedTuple):
    batches: Callable[[Path, int], Batches]
    form: str  # on disk, of tests/benchmarks/documents.py
    imports: tuple[str, ...] = ()  # not timed


ENGINES = {
    "ours": Engine(ours, "shards", ("data_pipeline.stream.loader",)),
    "memmap": Engine(memmap, "flat"),
    "memmap_gather": Engine(memmap_gather, "flat"),
    "webdataset": Engine(webdataset, "documents", ("webdataset",)),
    "streaming": Engine(streaming, "mds", ("streaming",)),
}

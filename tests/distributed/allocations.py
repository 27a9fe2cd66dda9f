"""Counts the bytes that a training step of the real engine holds: every storage that torch makes, while it lives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from data_pipeline.stream.loader import Batch
from tests.distributed.tiny_run import TinyEngine, config, counts
from trainer.config.parallel import ParallelConfig, Recompute
from trainer.distributed.mesh import join_ranks
from trainer.distributed.world import read_world
from trainer.model.gpt import GPT
from trainer.model.init import initialise


class Allocations(TorchDispatchMode):
    """`live` and `peak`: bytes of the storages that operators put out, beside those that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary(ref_type=weakref.ref)  # by identity

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen and storage.device.type != "meta":
            self._seen[storage] = True
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size

    def ignore_all(self) -> None:
        """Every tensor that there is now counts for nothing: what other cases left behind."""
        gc.collect()
        for found in gc.get_objects():
            if isinstance(found, Tensor):
                self._seen[found.untyped_storage()] = True

    def add_all(self) -> None:
        """Every tensor that this process can reach."""
        gc.collect()
        for found in gc.get_objects():
            if isinstance(found, Tensor):
                self.add(found)


@contextmanager
def saved_bytes(skip: set[int]) -> Iterator[dict[str, int]]:
    """What autograd keeps for backward, each storage once; `skip`: data pointers that are no activations."""
    found: dict[int, int] = {}
    total = {"bytes": 0}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in skip:
            found[storage.data_ptr()] = storage.nbytes()
            total["bytes"] = sum(found.values())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield total


def measure(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    return [measure_one(**case) for case in cases]


def measure_one(
    *,
    tp: int = 1,
    zero: int = 1,
    recompute: str = "none",
    sequence_parallel: bool = False,
    micro: int = 2,
    precision: str = "bf16",
    model: dict[str, Any],
) -> dict[str, int]:
    """Bytes on this rank: state between steps, activations saved by a forward, and the most that a step holds."""
    torch.set_num_threads(1)
    mesh = join_ranks(read_world(), ParallelConfig(name="tiny", tp=tp))
    cfg = config(
        tp=tp, sequence_parallel=sequence_parallel, zero=zero, precision=precision, model=model, micro_batch_size=micro
    )
    T = cfg.model.n_ctx
    cfg.tokens_per_step, cfg.data.lanes = micro * mesh.dp * T, mesh.dp
    counter = Allocations()
    counter.ignore_all()
    network = GPT(cfg.model, mesh, sequence_parallel=sequence_parallel, recompute=Recompute(recompute))
    initialise(network, cfg.model, 1)
    engine = TinyEngine(network, cfg, mesh)
    del network
    ids = torch.randint(cfg.model.vocab_size, (micro, T + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    valid = counts(micro * mesh.dp * T)
    engine.backward(batch, valid, last=True)
    engine.step(1e-3)
    counter.add_all()
    state, counter.peak = counter.live, counter.live
    forward, saved = engine._sums, {}

    def sums(batch: Batch) -> Tensor:
        skip = {t.untyped_storage().data_ptr() for t in gc.get_objects() if isinstance(t, Tensor)}
        with saved_bytes(skip) as total:
            out = forward(batch)
        saved.update(total, forward=counter.peak)
        return out

    engine._sums = sums  # type: ignore[method-assign]
    peaks = {}
    with counter:
        engine.backward(batch, valid, last=True)
        peaks["backward"], counter.peak = counter.peak, counter.live
        engine.step(1e-3)
        peaks["step"] = counter.peak
    out = {
        "dp": mesh.dp,
        "state": state,
        "saved": saved["bytes"],
        "forward": saved["forward"],
        **peaks,
    }
    engine.deepspeed.destroy()
    del engine
    return out

"""What torch does underneath: how often each operation runs, and the tensors that it makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Inside, `calls` counts each operation by name, and `made` holds (dtype, elements) of each tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made: set[tuple[torch.dtype, int]] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.calls[str(op)] += 1
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.made.add((tensor.dtype, tensor.untyped_storage().nbytes() // tensor.element_size()))
        return out


class Kept(Operations):
    """Inside, `now` is how many bytes live of what was made inside: after a forward, what backward will want."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(op, types, args, kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def now(self) -> int:
        return sum(size for storage, size in self._storages.values() if not storage.expired())


def kept_bytes(model: nn.Module, *inputs: Any) -> int:
    """What a forward keeps for its backward beside parameters and inputs, each piece of memory once."""
    with Kept() as kept:
        loss = model(*inputs)
        found = kept.now
    del loss
    return found

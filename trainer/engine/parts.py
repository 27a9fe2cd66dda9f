"""The parts of a module that is trained as one: its trunk, further trunks and heads.

A part is a submodule with `touch()` (`GPT`, `Head`), known by its name: "" for the trunk, whose parameters carry no
prefix. A micro step may leave parts out, such as the policy's while the value trunk trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.mesh import Mesh
from trainer.engine.fragments import Partition


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every part by name, the trunk first."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "touch")}


def part_name(parameter: str, parts: Iterable[str]) -> str:
    """The part that a parameter belongs to: the longest name that is a prefix of the parameter's."""
    return max((part for part in parts if not part or parameter.startswith(f"{part}.")), key=len)


def touch_unused(module: nn.Module, sums: Tensor) -> Tensor:
    """`sums`, with a gradient of 0 for the parameters of parts that they do not depend on.

    ZeRO-3 adds a micro step's gradients to what the last step has left for a parameter that the first micro step does
    not use, and offload copies to the host only what the last micro step uses. Neither reports an error. So each part
    that is left out computes on its shortest input, times 0.
    """
    parts = parts_of(module)
    if len(parts) < 2:
        return sums
    used = _leaves(sums)
    unused = {part_name(name, parts) for name, p in module.named_parameters() if p not in used}
    for name in sorted(unused):
        part: Any = parts[name]
        sums = sums + 0.0 * part.touch().float()
    return sums


def _leaves(root: Tensor) -> set[Tensor]:
    """The leaves of a tensor's graph that get a gradient."""
    stack: list[Any] = [root.grad_fn]
    seen, leaves = set(stack), set()
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.add(node.variable)
        for child, _ in getattr(node, "next_functions", ()):
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return leaves


class PartNorms:
    """The gradient norm of each part, measured while an optimizer of ZeRO's holds the reduced gradients."""

    def __init__(self, module: nn.Module, partitions: Iterable[Partition], mesh: Mesh) -> None:
        """To be made once ZeRO has partitioned the module."""
        self.mesh = mesh
        self.names = list(parts_of(module))
        self.squares = torch.zeros(len(self.names), dtype=torch.float64, device=mesh.device)
        self._slices: dict[Tensor, list[tuple[int, int, int]]] = {}  # by flat: part, offset, length
        split = {name for name, p in module.named_parameters() if getattr(p, "tensor_model_parallel", False)}
        for partition in partitions:
            if partition.flat is not None and partition.length and (mesh.tp_rank == 0 or partition.name in split):
                part = self.names.index(part_name(partition.name, self.names))
                self._slices.setdefault(partition.flat, []).append((part, partition.offset, partition.length))

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the squares of the gradients that this call of the optimizer's `step` updates by."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is not None and (slices := self._slices.get(flat)):
                    grads = [flat.grad.narrow(0, offset, length) for _, offset, length in slices]
                    squares = torch.stack(torch._foreach_norm(grads)).square().to(self.squares)
                    index = torch.tensor([part for part, _, _ in slices], device=self.squares.device)
                    self.squares.index_add_(0, index, squares)

    def take(self, norm: float) -> dict[str, float]:
        """Each part's share of the global gradient norm `norm`, before clipping. Collective; starts again."""
        dist.all_reduce(self.squares)
        squares = self.squares.tolist()
        self.squares.zero_()
        total = sum(squares)
        return {
            name or "trunk": norm * (x / total) ** 0.5 if total else 0.0
            for name, x in zip(self.names, squares, strict=True)
        }

"""Fragments of a rank under ZeRO: views of its fp32 masters and moments, for every wrapper of DeepSpeed.

Private names of DeepSpeed in this file: `p._hp_mapping` (ZeRO-1, 2, BF16_Optimizer), `p.ds_tensor`, `p.ds_numel`,
`p.ds_shape`, `p.ds_process_group`, `p._z3_optimizer` with its `grad_position`, `get_param_id`, `sub_group_to_group_id`
and `fp32_partitioned_groups_flat` (ZeRO-3). ZeRO-3's public `safe_get_local_fp32_param` will not do: with offload it is
a copy on the GPU, and writing to it would restore nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ADAMW, MUON = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)


@dataclass(frozen=True)
class Partition:
    """Elements [start, start + length) of a parameter, which ZeRO keeps on this rank at `offset` of `flat`.

    `length` 0: other dp ranks own all of it; `flat` is then known under ZeRO-3 only.
    """

    name: str
    shape: tuple[int, ...]
    flat: Tensor | None
    offset: int
    start: int
    length: int


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of one flattened parameter as it lies on this tp rank.

    `views`: for "master" and each of the optimizer's moments of this parameter (`ADAMW` or `MUON`) a 1-D fp32 view of
    what the optimizer works on; writing to it restores.
    """

    name: str
    start: int
    length: int
    views: dict[str, Tensor]


def create_state(zero: Any, adam: torch.optim.Optimizer) -> None:
    """Zero moments for every flat of ZeRO's, as the optimizer itself would make them at its first step.

    Made at the start of every run, so that a fresh run and a resumed one are the same code. A group with a momentum is
    Muon's, the others are AdamW's.
    """
    for flat, group in _flats(zero, adam):
        moments = MUON if "momentum" in group else ADAMW
        adam.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),  # where fused AdamW wants it
            **{kind: torch.zeros_like(flat.data) for kind in moments},
        }


def get_optimizer_step(adam: torch.optim.Optimizer) -> int:
    """Updates made so far."""
    return max(int(state["step"]) for state in adam.state.values())


def set_optimizer_step(adam: torch.optim.Optimizer, step: int) -> None:
    for state in adam.state.values():
        state["step"].fill_(step)


def partitions(module: nn.Module, adam: torch.optim.Optimizer) -> Iterator[Partition]:
    """Every parameter's partition on this rank, without communication. Those of all dp ranks tile each parameter."""
    p: Any  # a parameter with DeepSpeed's attributes
    for name, p in module.named_parameters():
        if hasattr(p, "ds_id"):
            width = p.ds_tensor.numel()  # the same on every rank; the last ones are filled up with padding
            start = width * dist.get_rank(p.ds_process_group)
            length = max(0, min(width, p.ds_numel - start))
            zero = p._z3_optimizer
            group, offset, _ = zero.grad_position[zero.get_param_id(p)]
            yield Partition(name, tuple(p.ds_shape), zero.fp32_partitioned_groups_flat[group], offset, start, length)
        elif p._hp_mapping is not None:
            master, weight = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            flat = adam.param_groups[p._hp_mapping.param_group_index]["params"][0]
            yield Partition(name, tuple(p.shape), flat, master.start, weight.start, master.numel)
        else:
            yield Partition(name, tuple(p.shape), None, 0, 0, 0)


def owned(module: nn.Module, adam: torch.optim.Optimizer) -> Iterator[Fragment]:
    """This rank's fragments, without communication. Those of all dp ranks tile each parameter."""
    for partition in partitions(module, adam):
        if partition.length and partition.flat is not None:
            moments = {kind: x for kind, x in adam.state[partition.flat].items() if kind != "step"}
            flats = {"master": partition.flat, **moments}
            views = {k: x.detach().narrow(0, partition.offset, partition.length) for k, x in flats.items()}
            yield Fragment(partition.name, partition.start, partition.length, views)


@torch.no_grad()
def assign(module: nn.Module, adam: torch.optim.Optimizer, name: str, value: float) -> None:
    """Give all elements of a parameter one value, in its masters and in the weights computed with. On every rank."""
    for fragment in owned(module, adam):
        if fragment.name == name:
            fragment.views["master"].fill_(value)
    p: Any = module.get_parameter(name)
    p.data.fill_(value)  # under ZeRO-3 empty, unless the parameter is small enough to be kept whole
    if hasattr(p, "ds_id"):
        p.ds_tensor.fill_(value)


def _flats(zero: Any, adam: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """The fp32 tensors that are updated and the group of each: ZeRO-3 keeps them outside of the parameter groups."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        flats = enumerate(zero.fp32_partitioned_groups_flat)
        return [(flat, adam.param_groups[zero.sub_group_to_group_id[i]]) for i, flat in flats]
    return [(flat, group) for group in adam.param_groups for flat in group["params"]]

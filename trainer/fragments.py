"""What a rank owns under ZeRO: views of its fp32 masters and Adam moments, for every wrapper of DeepSpeed.

Private names of DeepSpeed in this file: `p._hp_mapping` (ZeRO-1, 2, BF16_Optimizer), `p.ds_tensor`, `p.ds_numel`,
`p.ds_process_group` and `optimizer.fp32_partitioned_groups_flat` (ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of one flattened parameter as it lies on this tp rank.

    `views`: for each of KINDS a 1-D fp32 view of what the optimizer works on; writing to it restores.
    """

    name: str
    start: int
    length: int
    views: dict[str, Tensor]


def create_state(zero: Any, adam: torch.optim.Optimizer) -> None:
    """Zero moments for every flat of ZeRO's, as AdamW itself would make them at its first step.

    Made at the start of every run, so that a fresh run and a resumed one are the same code.
    """
    for flat in _flats(zero, adam):
        adam.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),  # where fused AdamW wants it
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }


def get_optimizer_step(adam: torch.optim.Optimizer) -> int:
    """Updates made so far."""
    return int(next(iter(adam.state.values()))["step"])


def set_optimizer_step(adam: torch.optim.Optimizer, step: int) -> None:
    for state in adam.state.values():
        state["step"].fill_(step)


def owned(module: nn.Module, adam: torch.optim.Optimizer) -> Iterator[Fragment]:
    """This rank's fragments, without communication. Together the dp ranks' tile each parameter."""
    p: Any  # a parameter with what DeepSpeed hangs on it
    for name, p in module.named_parameters():
        if hasattr(p, "ds_id"):
            width = p.ds_tensor.numel()  # the same on every rank; the last ones are filled up with padding
            start = width * dist.get_rank(p.ds_process_group)
            length = max(0, min(width, p.ds_numel - start))
            flats = {k: _local_zero3(p, k) for k in KINDS}
            offset = 0
        elif p._hp_mapping is not None:
            mapping = p._hp_mapping
            flat = adam.param_groups[mapping.param_group_index]["params"][0]
            start, length = mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
            flats = {k: flat if k == "master" else adam.state[flat][k] for k in KINDS}
        else:
            continue  # another rank owns all of it
        if length:
            yield Fragment(name, start, length, {k: f.detach().narrow(0, offset, length) for k, f in flats.items()})


def _local_zero3(p: Tensor, kind: str) -> Tensor:
    return safe_get_local_fp32_param(p) if kind == "master" else safe_get_local_optimizer_state(p, kind)


def _flats(zero: Any, adam: torch.optim.Optimizer) -> list[Tensor]:
    """The fp32 tensors that AdamW updates: ZeRO-3 keeps them outside of the parameter groups."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return [p for group in adam.param_groups for p in group["params"]]

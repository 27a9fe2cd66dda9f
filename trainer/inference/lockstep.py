"""Forwards that all ranks make together, though each has its own number of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from conf.errors import UserError
from trainer.model.gpt import GPT

DONE, MORE, FAILED = range(3)  # of a rank's forwards; the highest over the ranks decides


def run_in_lockstep(model: GPT, forwards: Iterator[None]) -> None:
    """Exhaust `forwards`, which yields before each forward of `model`, inside `GPT.for_inference`.

    Under ZeRO-3 a forward gathers weights from all ranks. There all ranks make as many forwards as the one that needs
    most: a rank that has none left, or never had any, computes a single token and ignores it.

    Raises:
        UserError: another rank's `forwards` failed; that rank raises its own error.
    """
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())  # DeepSpeed's mark on parameters of ZeRO-3
    if not partitioned:
        with model.for_inference():
            for _ in forwards:
                pass
        return
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.mesh.device)
    with model.for_inference():
        own, error = _advance(forwards)
        while (state := _highest(own, model.mesh.device)) == MORE:
            if own == MORE:
                own, error = _advance(forwards)
            else:
                model.logits(token_11)
    if error is not None:
        raise error
    if state == FAILED:
        raise UserError("another rank failed while sampling or scoring: its message gives the reason")


def _advance(forwards: Iterator[None]) -> tuple[int, Exception | None]:
    """Makes a forward and all that follows up to the next one; returns the state then, and an error."""
    try:
        return (MORE if next(forwards, False) is None else DONE), None
    except Exception as e:
        return FAILED, e


def _highest(own: int, device: torch.device) -> int:
    state = torch.tensor(own, device=device)
    dist.all_reduce(state, dist.ReduceOp.MAX)
    return int(state)

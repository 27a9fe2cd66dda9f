"""What the host learns from the device without holding it up.

A step has one wait: for the gradient norm, which decides whether the update is made. All else that the host wants to
know of a step is on its way before that, and has come by then.
"""

from __future__ import annotations

import torch
from torch import Tensor


class OnItsWay:
    """Numbers of a tensor [n], copied to the host while the device works on."""

    def __init__(self, x: Tensor) -> None:
        self._host = x.detach().to("cpu", non_blocking=True)  # from a GPU into page-locked memory
        self._come = torch.cuda.Event() if x.is_cuda else None
        if self._come is not None:
            self._come.record()

    def numbers(self) -> list[float]:
        """The numbers; waits for the copy alone, not for what the device was given after it."""
        if self._come is not None:
            self._come.synchronize()
        found: list[float] = self._host.tolist()
        return found


def to_device(numbers: list[float], device: torch.device) -> Tensor:
    """fp64 numbers [n] on the device, without a wait for what it is doing."""
    pinned = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)

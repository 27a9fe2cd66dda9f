"""What the host learns from the device without holding it up.

A step has one wait: for the gradient norm, which decides whether the update is made. All else that the host wants to
know of a step is on its way before that, and has come by then.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor


class AsyncCopy:
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


class ComputeTimer:
    """The seconds that a rank itself worked for a step, without those in which it waited for the others."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began = 0.0
        self._events: list[torch.cuda.Event] = []
        self._before: list[torch.cuda.Event] = []

    def start(self) -> None:
        """The work begins that no one else takes part in."""
        if self._is_cuda:
            self._before, self._events = self._events, [self._mark()]
        else:
            self._began = time.thread_time()  # a collective waits without computing

    def stop(self, waited: float) -> float | None:
        """It has ended. Returns `waited` (for data) + the work; on a GPU, which is not waited for, that of the step
        before; None where that is not known."""
        if not self._is_cuda:
            return waited + time.thread_time() - self._began
        self._events.append(self._mark())
        if len(self._before) < 2 or not self._before[1].query():
            return None
        return waited + self._before[0].elapsed_time(self._before[1]) / 1e3

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

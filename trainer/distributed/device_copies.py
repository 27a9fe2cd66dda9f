"""Copies from device to host, and back, that do not stall the device's stream; and a timer that does not either.

A step has one wait: for the gradient norm, which decides whether the update is made. All other numbers of a step are
copied before that, and have arrived by then.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor


class AsyncCopy:
    """Numbers of a tensor [n], copied to the host while the device works on."""

    def __init__(self, x: Tensor) -> None:
        self._host = x.detach().to("cpu", non_blocking=True)  # from a GPU into page-locked memory
        self._copied = torch.cuda.Event() if x.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def values(self) -> list[float]:
        """The numbers; waits for the copy alone, not for work that the device got after it."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.tolist()
        return values


def to_device(numbers: list[float], device: torch.device) -> Tensor:
    """fp64 numbers [n] on the device, without waiting for the device."""
    pinned = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class ComputeTimer:
    """Measures the seconds of a step in which a rank itself worked, without those in which it waited for others."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began = 0.0
        self._events: list[torch.cuda.Event] = []
        self._before: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Begin the part of a step without collectives."""
        if self._is_cuda:
            self._before = self._events
            self._events = [self._mark()]
        else:
            self._began = time.thread_time()  # a collective waits without computing

    def stop(self, waited: float) -> float | None:
        """End that part. Returns `waited` (for data) + the work, in seconds.

        On a GPU, which is not waited for, the work is that of the step before; None if it is not known yet.
        """
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

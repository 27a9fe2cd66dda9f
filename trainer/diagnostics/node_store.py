"""The meeting point of a node check: a key-value store at MASTER_ADDR. It works before, and without, collectives."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.distributed.world import World

TURNS = 8  # round trips, of which the quickest counts


class MissedError(Exception):
    """Ranks did not come in time; the text names them, and those that came."""


class Meeting:
    """Gathers values of all ranks, each within `timeout_s`."""

    def __init__(self, world: World, timeout_s: float) -> None:
        """Raises RuntimeError (torch's DistError): rank 0's address does not answer, or cannot be listened at."""
        self.world = world
        self.timeout_s = timeout_s
        self.server = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        host, _, port = self.server.rpartition(":")
        listens = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent does
        limit = timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(host, int(port), world.world_size, listens, limit, wait_for_workers=False)

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values that the ranks bring under `name`, by rank, on all ranks. It is a barrier, too.

        Raises:
            MissedError: on rank 0; on the others also if rank 0 does not come.
        """
        self.store.set(f"{name}/{self.world.rank}", json.dumps(value))
        if self.world.is_main:
            keys = [f"{name}/{rank}" for rank in range(self.world.world_size)]
            self._wait(name, keys)
            self.store.set(f"{name}/all", json.dumps([json.loads(self.store.get(key)) for key in keys]))
        else:  # rank 0 may come as late as all may, and then wait as long
            try:
                self.store.wait([f"{name}/all"], timedelta(seconds=2 * self.timeout_s + 10))
            except RuntimeError as e:
                raise MissedError(f"rank 0 did not come to {name!r}: {e}") from None
        values: list[Any] = json.loads(self.store.get(f"{name}/all"))
        return values

    def _wait(self, name: str, keys: list[str]) -> None:
        deadline = time.monotonic() + self.timeout_s
        for key in keys:
            try:
                self.store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except RuntimeError:
                came = [rank for rank, k in enumerate(keys) if self.store.check([k])]
                missed = [rank for rank in range(len(keys)) if rank not in came]
                raise MissedError(
                    f"ranks {ranges(missed)} of {len(keys)} did not come to {name!r} within {self.timeout_s:g} s; "
                    f"there were ranks {ranges(came)}"
                ) from None

    def clocks(self, ranks: list[int]) -> dict[int, tuple[float, float]]:
        """On rank 0, for each of `ranks`: (seconds its clock is ahead of rank 0's, bound of the error).

        A rank's answer lies between the question and the answer's arrival: the middle is taken, and half of the
        quickest round trip bounds the error. All ranks call it; those that are not in `ranks` return at once.
        """
        skews: dict[int, tuple[float, float]] = {}
        for rank in ranks:
            for turn in range(TURNS):
                ping, pong = f"ping/{rank}/{turn}", f"pong/{rank}/{turn}"
                if self.world.is_main:
                    sent = time.time()
                    self.store.set(ping, "")
                    theirs = float(self.store.get(pong))
                    came = time.time()
                    error = (came - sent) / 2
                    if rank not in skews or error < skews[rank][1]:
                        skews[rank] = (theirs - (sent + came) / 2, error)
                elif self.world.rank == rank:
                    self.store.get(ping)
                    self.store.set(pong, repr(time.time()))
        return skews


def ranges(numbers: list[int]) -> str:
    """The numbers in words, such as "0-3, 7"; "none" for no numbers."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "none"


def nodes_of(local_ranks: list[int]) -> list[list[int]]:
    """The ranks of each node: they are numbered node by node, from local rank 0 on."""
    nodes: list[list[int]] = []
    for rank, local in enumerate(local_ranks):
        if local == 0 or not nodes:
            nodes.append([])
        nodes[-1].append(rank)
    return nodes

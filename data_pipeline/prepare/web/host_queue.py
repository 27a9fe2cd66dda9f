"""Whose turn it is: hosts that are asked one thing at a time, with a pause after each."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from data_pipeline.prepare.web.urls import Address, normal

OPEN = 8  # hosts for each connection that are asked in turn; the others wait until one of them is done


@dataclass(slots=True, eq=False)
class Job:
    """A link on its way: where it has led so far, and how often that was tried."""

    link: str
    at: Address
    hops: int = 0
    tries: int = 0


@dataclass(slots=True)
class Host:
    links: list[str] = field(default_factory=list)  # not yet begun, the next one last
    jobs: list[Job] = field(default_factory=list)  # begun
    ready: float = 0.0  # when it may be asked again, on the monotonic clock
    tries: int = 0  # of its robots.txt
    silent: int = 0
    active: bool = False  # in the queue or asked right now


class HostQueue:
    """What is to be asked of which host, and when. All that is shared is changed under `lock`."""

    def __init__(self, connections: int) -> None:
        self.lock = threading.Condition()
        self.stopped = threading.Event()
        self.hosts: dict[str, Host] = {}
        self._most = OPEN * connections
        self._queue: list[tuple[float, str]] = []
        self._waiting: deque[str] = deque()
        self._active = 0

    def add(self, link: str, host: str) -> None:
        """Before `begin`."""
        self.hosts.setdefault(host, Host()).links.append(link)

    def begin(self) -> None:
        for host in self.hosts.values():
            host.links.reverse()
        self._waiting.extend(self.hosts)

    def stop(self) -> None:
        self.stopped.set()
        with self.lock:
            self.lock.notify_all()

    def next(self) -> str | None:
        """The host whose turn it is, waited for; None when there is nothing left to do."""
        with self.lock:
            while not self.stopped.is_set():
                while self._waiting and self._active < self._most:
                    self._activate(self._waiting.popleft())
                if not self._active:
                    self.stop()
                    break
                now = time.monotonic()
                if self._queue and self._queue[0][0] <= now:
                    _, name = heapq.heappop(self._queue)
                    if (ready := self.hosts[name].ready) <= now:
                        self.lock.notify()  # another waits for the next in the queue
                        return name
                    heapq.heappush(self._queue, (ready, name))  # a robots.txt led here meanwhile
                else:
                    self.lock.wait(self._queue[0][0] - now if self._queue else None)
            return None

    def _activate(self, name: str) -> None:
        host = self.hosts.setdefault(name, Host())
        if not host.active and (host.jobs or host.links):
            host.active = True
            self._active += 1
            heapq.heappush(self._queue, (host.ready, name))

    def put_back(self, name: str) -> None:
        host = self.hosts[name]
        with self.lock:
            if host.jobs or host.links:
                heapq.heappush(self._queue, (host.ready, name))
            else:
                host.active = False
                self._active -= 1
            self.lock.notify()

    def job(self, host: Host) -> Job | None:
        """What the host is asked next; it stays the host's until it is removed."""
        with self.lock:
            if not host.jobs and host.links:
                host.jobs.append(_begun(host.links.pop()))
            return host.jobs[-1] if host.jobs else None

    def move(self, host: Host, job: Job, to: Address) -> None:
        with self.lock:
            host.jobs.remove(job)
            job.at, job.hops, job.tries = to, job.hops + 1, 0
            self.hosts.setdefault(to.host, Host()).jobs.append(job)
            self._activate(to.host)
            self.lock.notify()

    def pause(self, host: Host, seconds: float) -> None:
        with self.lock:
            host.ready = max(host.ready, time.monotonic() + seconds)

    def wait_for(self, name: str, pause: float) -> None:
        """The turn of a host that a robots.txt leads to."""
        with self.lock:
            host = self.hosts.setdefault(name, Host())
            ready = max(time.monotonic(), host.ready)
            host.ready = ready + pause
        self.stopped.wait(ready - time.monotonic())


def _begun(link: str) -> Job:
    address = normal(link)
    assert address is not None
    return Job(link, address)

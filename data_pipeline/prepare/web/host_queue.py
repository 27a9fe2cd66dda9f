"""The order of requests: one at a time to each host, with a pause after each."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from data_pipeline.prepare.web.urls import Url, normalize

OPEN = 8  # hosts for each connection that are active in turn; the others wait until one of them is done


@dataclass(slots=True, eq=False)
class Request:
    """A link that is being fetched: the URL that it has led to so far, and the tries of that URL."""

    link: str
    url: Url
    hops: int = 0
    tries: int = 0


@dataclass(slots=True)
class Host:
    links: list[str] = field(default_factory=list)  # not started yet, the next one last
    requests: list[Request] = field(default_factory=list)  # started
    ready: float = 0.0  # time of the next request, on the monotonic clock
    tries: int = 0  # of its robots.txt
    silent: int = 0  # links in a row without an answer
    active: bool = False  # in the queue, or with a request right now


class HostQueue:
    """The hosts and their requests. All that threads share is changed under `lock`."""

    def __init__(self, connections: int) -> None:
        self.lock = threading.Condition()
        self.stopped = threading.Event()
        self.hosts: dict[str, Host] = {}
        self._limit = OPEN * connections
        self._queue: list[tuple[float, str]] = []
        self._waiting: deque[str] = deque()
        self._active = 0

    def add(self, link: str, name: str) -> None:
        """Add a link of the host `name`; before `start`."""
        self.hosts.setdefault(name, Host()).links.append(link)

    def start(self) -> None:
        for host in self.hosts.values():
            host.links.reverse()
        self._waiting.extend(self.hosts)

    def stop(self) -> None:
        self.stopped.set()
        with self.lock:
            self.lock.notify_all()

    def next(self) -> str | None:
        """Wait for the next host that is ready; its name, or None if nothing is left to do."""
        with self.lock:
            while not self.stopped.is_set():
                while self._waiting and self._active < self._limit:
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
                    heapq.heappush(self._queue, (ready, name))  # a robots.txt led to it meanwhile
                else:
                    self.lock.wait(self._queue[0][0] - now if self._queue else None)
            return None

    def _activate(self, name: str) -> None:
        host = self.hosts.setdefault(name, Host())
        if not host.active and (host.requests or host.links):
            host.active = True
            self._active += 1
            heapq.heappush(self._queue, (host.ready, name))

    def put_back(self, name: str) -> None:
        host = self.hosts[name]
        with self.lock:
            if host.requests or host.links:
                heapq.heappush(self._queue, (host.ready, name))
            else:
                host.active = False
                self._active -= 1
            self.lock.notify()

    def request(self, host: Host) -> Request | None:
        """The host's next request; it stays the host's until it is removed."""
        with self.lock:
            if not host.requests and host.links:
                link = host.links.pop()
                url = normalize(link)
                assert url is not None
                host.requests.append(Request(link, url))
            return host.requests[-1] if host.requests else None

    def redirect(self, host: Host, request: Request, url: Url) -> None:
        """Move a request to the host of `url`."""
        with self.lock:
            host.requests.remove(request)
            onward = Request(request.link, url, request.hops + 1)
            self.hosts.setdefault(url.host, Host()).requests.append(onward)
            self._activate(url.host)
            self.lock.notify()

    def pause(self, host: Host, seconds: float) -> None:
        with self.lock:
            host.ready = max(host.ready, time.monotonic() + seconds)

    def wait_for(self, name: str, pause: float) -> None:
        """Wait until the host `name`, to which a robots.txt leads, may get a request; the next one waits `pause` s."""
        with self.lock:
            host = self.hosts.setdefault(name, Host())
            ready = max(time.monotonic(), host.ready)
            host.ready = ready + pause
        self.stopped.wait(ready - time.monotonic())

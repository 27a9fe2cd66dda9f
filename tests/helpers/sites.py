"""Web sites on loopback that answer as planned, and remember each request and its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HTML = {"Content-Type": "text/html; charset=utf-8"}


@dataclass
class Reply:
    """fault: "hang" (no answer), "dribble" (a byte now and then), "dribbled headers", "cut" (half of it), "endless",
    "no length" (half of it, which only the end of the connection shows), "garbage" (no HTTP)."""

    body: bytes = b"<p>page</p>"
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: dict(HTML))
    fault: str = ""


class Site(ThreadingHTTPServer):
    """`replies`: path -> its answers, one after the other, the last one for good. robots.txt is 404 unless it is there.

    asked: (seconds on the monotonic clock, host that was asked for, path).
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = self.server_address[1]
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[tuple[float, str, str]] = []
        self.agents: set[str] = set()
        self.stopped = threading.Event()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def put(self, path: str, *replies: Reply | bytes | int) -> None:
        made = [Reply(r) if isinstance(r, bytes) else Reply(status=r) if isinstance(r, int) else r for r in replies]
        self.replies[path] = made

    def move(self, path: str, to: str) -> None:
        self.put(path, Reply(b"", 302, {"Location": to}))

    def count(self, path: str) -> int:
        return sum(p == path for _, _, p in self.asked)

    def times(self, host: str = "127.0.0.1") -> list[float]:
        return [seconds for seconds, h, _ in self.asked if h == host]

    def handle_error(self, *_: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site, path = self.server, self.path
        site.asked.append((time.monotonic(), self.headers.get("Host", "").partition(":")[0], path))
        site.agents.add(self.headers.get("User-Agent", ""))
        left = site.replies.get(path) or [Reply(status=404)]
        reply = left.pop(0) if len(left) > 1 else left[0]
        if reply.fault == "hang":
            site.stopped.wait(60)
        elif reply.fault == "garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        elif reply.fault == "dribbled headers":
            self.dribble(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 60_000)
        else:
            self.answer(reply)

    def answer(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            self.send_header(key, value)
        if reply.fault not in ("endless", "no length"):
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if reply.fault == "dribble":
            self.dribble(reply.body)
        elif reply.fault in ("cut", "no length"):
            self.wfile.write(reply.body[: len(reply.body) // 2])
        elif reply.fault == "endless":
            while not self.server.stopped.is_set():
                self.wfile.write(bytes(1 << 16))
        else:
            self.wfile.write(reply.body)

    def dribble(self, body: bytes) -> None:
        for i in range(len(body)):
            self.wfile.write(body[i : i + 1])
            if self.server.stopped.wait(0.03):
                return


@contextmanager
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()

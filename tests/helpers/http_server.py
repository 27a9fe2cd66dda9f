"""A real HTTP server on loopback that serves a folder, and misbehaves when told to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from urllib.parse import unquote


class Server(ThreadingHTTPServer):
    """Serves the files of `folder`.

    faults: file name -> what happens to its next requests, one after the other; those after the last go well.
        500, 404, ...: that status. hang: no answer. dribble: a byte now and then. dribbled headers: the same, of
        headers. slow: 1 MiB now and then. cut: half of the body. no length: the same, of a length that is not said.
        flip: one bit of the body's last byte turned. endless: a body without end. to URL: a redirect.
    requests: (name, "Range" header or ""), in the order they came.
    """

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.stopped = folder, ranges, threading.Event()
        self.faults: dict[str, Iterator[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []  # as they were asked for
        self.delay = 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, name: str) -> int:
        return sum(n == name for n, _ in self.requests)

    def always(self, name: str, fault: str) -> None:
        self.faults[name] = repeat(fault)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name, range_ = unquote(self.path.lstrip("/")), self.headers.get("Range", "")
        self.server.requests.append((name, range_))
        self.server.paths.append(self.path)
        name = name.partition("?")[0]
        self.server.headers.append({key.lower(): value for key, value in self.headers.items()})
        fault = next(self.server.faults.get(Path(name).name, iter(())), "")
        time.sleep(self.server.delay)
        try:
            self.answer(name, range_, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, name: str, range_: str, fault: str) -> None:
        path = self.server.folder / name
        status = int(fault) if fault.isdecimal() else 404 if not path.is_file() else 200
        if fault == "hang":
            self.server.stopped.wait(60)
            return
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"sad\n")
            return
        total = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", range_)
        if asked and self.server.ranges:
            a, b = int(asked[1]), min(int(asked[2]), total - 1)
            if a >= total:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status = 206
        else:
            a, b = 0, total - 1
        with path.open("rb") as f:
            f.seek(a)
            body = f.read(b + 1 - a)
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "dribbled headers":
            self.dribble(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 60_000)
            return
        self.send_response(status)
        self.send_header("ETag", f'"{path.stat().st_ino}-{path.stat().st_mtime_ns}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {a}-{b}/{total}")
        if fault in ("endless", "no length"):
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "dribble":
            self.dribble(body)
        elif fault == "endless":
            while not self.server.stopped.is_set():
                self.wfile.write(body + bytes(1 << 16))
        elif fault == "slow":
            for at in range(0, len(body), 1 << 20):
                self.wfile.write(body[at : at + (1 << 20)])
                time.sleep(0.35)
        elif fault in ("cut", "no length"):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def dribble(self, body: bytes) -> None:
        for i in range(len(body)):
            self.wfile.write(body[i : i + 1])
            if self.server.stopped.wait(0.05):
                return


@contextmanager
def serving(folder: Path, ranges: bool = True) -> Iterator[Server]:
    server = Server(folder, ranges)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)

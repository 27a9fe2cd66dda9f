"""A source behind a real HTTP server: the same run as from a folder; a server that goes away stops it, for a while."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.system.mixtures import check_fed, in_turn, make_mixture, mixture, shard_first_needed_near, state
from tests.system.test_resume import story, weights

WEIGHTS, STEPS = {"books": 1, "web": 3}, 12


class Files(ThreadingHTTPServer):
    """The files below `root`, whole or in ranges; of what is `gone` the connection is cut without an answer."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root, self.gone, self.asked = root, "", list[str]()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Files
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.gone and self.path.endswith(self.server.gone):
            self.close_connection = True
            return
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = body[int(asked[1]) : int(asked[2]) + 1] if asked else body
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Files]:
    with Files(make_mixture(tmp_path / "data", {"web": [4] * 9, "books": [4] * 4})) as files:
        thread = threading.Thread(target=files.serve_forever)
        thread.start()
        yield files
        files.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_source_behind_http_gives_the_run_of_the_folder(tmp_path: Path, server: Files) -> None:
    """A server that goes away stops the run until it is back."""
    lost, step = shard_first_needed_near(server.root, WEIGHTS, 5, "web")
    common = (f"max_steps={STEPS}", "checkpoint.every_steps=1", "data.fetch.retries=1", "data.fetch.timeout_s=2")
    folder = (*mixture(server.root, WEIGHTS), *common)

    def afar(cache: str) -> tuple[str, ...]:
        # books stay in their folder: data.path stands before what stands not for itself
        path = f"data.sources.web.path={server.url}/web"
        return (*mixture(server.root, WEIGHTS), *common, path, f"data.cache.dir={tmp_path / cache}")

    server.gone = f"web/train/{lost:05d}.tar"
    runs = [(tmp_path / "folder", folder), (tmp_path / "run", afar("cache"))]
    [[_, said]] = in_turn(runs)
    refusal = said.splitlines()[-1]
    assert refusal.startswith(f"error: {server.url}/web/train/{lost:05d}.tar: "), refusal
    assert "tried 2 times" in refusal and "data.fetch.retries" in refusal, refusal
    assert state(tmp_path / "run")["step"] == state(tmp_path / "run")["optimizer_step"] == len(story(tmp_path / "run"))
    assert state(tmp_path / "run")["step"] == step

    server.gone = "manifest.json"
    [[said]] = in_turn([(tmp_path / "run", afar("cache"))])
    assert re.fullmatch(rf"error: {server.url}/web/train: .*tried 2 times.*", said), said

    server.gone = ""
    in_turn([(tmp_path / "run", afar("cache")), (tmp_path / "at once", afar("another cache"))])
    assert any(path.endswith(".tar") for path in server.asked)
    for name in ("run", "at once"):
        assert story(tmp_path / name) == story(tmp_path / "folder"), name
        assert weights(tmp_path / name) == weights(tmp_path / "folder"), name
    check_fed(server.root, tmp_path / "run", list(WEIGHTS), {range(STEPS): 1})

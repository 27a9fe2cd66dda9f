"""A real S3 server on this machine, moto's, and a bucket that holds copies of folders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest


class Bucket:
    def __init__(self) -> None:
        self.url = "s3://bucket"
        self.files: Any = fsspec.filesystem("s3", skip_instance_cache=True)
        self.files.mkdir("bucket")

    def put(self, folder: Path) -> str:
        """The URL of a copy of the folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files.pipe_file(f"bucket/{path.relative_to(folder.parent)}", path.read_bytes())
        return f"{self.url}/{folder.name}"


@contextmanager
def bucket() -> Iterator[Bucket]:
    """An empty bucket, which this process and those that it starts find by the environment."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: nothing reads s3://")
    server = pytest.importorskip("moto.server", reason="moto is not installed: there is no S3 server")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    running.start()
    try:
        with pytest.MonkeyPatch.context() as env:
            host, port = running.get_host_and_port()
            env.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                env.setenv(name, "any")
            env.setenv("AWS_DEFAULT_REGION", "us-east-1")
            fsspec.filesystem("s3").clear_instance_cache()  # of another server
            yield Bucket()
    finally:
        running.stop()

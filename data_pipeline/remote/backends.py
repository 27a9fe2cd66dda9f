"""Backends that read the bytes of one file: http(s), the protocols of fsspec (s3://, gs://, ...) and pipe:.

Time limits and retries are in data_pipeline/remote/fetch.py.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from conf.errors import UserError
from data_pipeline.config import FetchConfig

_CHUNK = 1 << 18  # bytes
_ESCAPED = "%!$&'()*+,;=:@~"  # of a file's name in a URL these stay: it is spelled as the URL spells it


class Unreachable(Exception):
    """The backend does not answer as it should; it may later."""


class Lost(Exception):
    """The backend answers, and the file is missing or no longer what the manifest promises."""


class Corrupt(Exception):
    """The bytes are not what the manifest promises. They are read once more before the shard is Lost."""


class Head(NamedTuple):
    """An answer before its first byte.

    `start` is the offset of the first byte, `total` the size of the whole file (None: unknown), and `version` differs
    between states of the file ("": unknown).
    """

    start: int
    total: int | None
    version: str = ""


Opened = AbstractContextManager[tuple[Head, Iterator[bytes]]]


class Backend(Protocol):
    """Reads files below a URL. `url` is for messages, without secrets; `ranged`: reads may start in mid-file."""

    url: str
    ranged: bool | None  # None: unknown

    def open(self, name: str, start: int, length: int | None) -> Opened:
        """The file's bytes from `start` on, or from 0 if the backend cannot start there; length None means all.

        Raises Unreachable, Lost, Corrupt; also while the bytes are read.
        """
        ...


def is_remote(path: str) -> bool:
    """The path is a URL or a pipe: command, not a local path."""
    return path.startswith("pipe:") or bool(re.match(r"[a-z][a-z0-9+.]*://", path))


def backend_of(url: str, fetch: FetchConfig) -> Backend:
    """The backend of a URL; raises UserError for an unknown protocol, or one whose package is not installed."""
    if url.startswith("pipe:"):
        return Pipe(url, fetch)
    if url.startswith(("http://", "https://")):
        return Http(url, fetch)
    return Fsspec(url)


def shown(url: str) -> str:
    """A URL as messages name it: without possible secrets (user, query, the words of a command)."""
    if url.startswith("pipe:"):
        program = url.removeprefix("pipe:").split(maxsplit=1)
        return f"pipe:{program[0]} ...{' {}' * ('{}' in url)}" if len(program) > 1 else url
    kind, _, rest = url.partition("://")
    server, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{kind}://{server.rpartition('@')[2]}{slash}{path}"


def refuse_password(url: str) -> None:
    """Raises UserError for a URL with a password, which the run's folder would show."""
    user, mark, _ = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")
    if mark and not url.startswith("pipe:") and (":" in user or url.startswith(("http://", "https://"))):
        raise UserError(
            f"{shown(url)}: its URL holds a user or a password, which the run's config.yaml and state.json would show: "
            f"s3:// and gs:// find them in their clients' own files or the environment; for http give "
            f"pipe:COMMAND {{}} with a command that reads them from a file, as curl --netrc does"
        )


class Http:
    """http:// and https://."""

    def __init__(self, url: str, fetch: FetchConfig) -> None:
        import urllib3

        self.url = shown(url)
        self.ranged: bool | None = None
        try:
            self._parts = urlsplit(url)
        except ValueError as e:
            raise UserError(f"{self.url}: {e}") from None
        never = urllib3.Retry(None, connect=0, read=0, redirect=5, status=0, other=0)  # fetch.py tries again
        self._pool = urllib3.PoolManager(maxsize=16, timeout=fetch.timeout_s, retries=never)

    @contextmanager
    def open(self, name: str, start: int, length: int | None) -> Iterator[tuple[Head, Iterator[bytes]]]:
        from urllib3.exceptions import HTTPError

        url = urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{quote(name, safe=_ESCAPED)}"))
        range_ = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}
        response = None
        try:
            headers = {"Accept-Encoding": "identity"} | range_
            response = self._pool.request("GET", url, headers=headers, preload_content=False, decode_content=False)
            head = self._head(response, start, length)
            yield head, self._chunks(response, head, start + length if length is not None else 0)
        except HTTPError as e:
            query = self._parts.query
            raise Unreachable(_cause(e).replace(query, "...") if query else _cause(e)) from None
        finally:
            if response is not None:
                response.close()

    @staticmethod
    def _chunks(response: Any, head: Head, end: int) -> Iterator[bytes]:
        position = head.start
        while chunk := response.read1(_CHUNK):
            yield chunk
            position += len(chunk)
        if position < min(end, head.total or end):  # if the answer declares no length, a cut looks like an end
            raise Unreachable(f"the answer ended at byte {position}, bytes up to {end} were requested")

    def _head(self, response: Any, start: int, length: int | None) -> Head:
        status, headers = response.status, response.headers
        if status in (404, 410):
            raise Lost(f"HTTP {status}")
        if status == 416:
            raise Corrupt(f"truncated: the server has no byte {start}")
        if status not in (200, 206) or headers.get("Content-Encoding", "identity") != "identity":
            raise Unreachable(f"HTTP {status} {headers.get('Content-Encoding', '')}".strip())
        version = headers.get("ETag") or headers.get("Last-Modified", "")
        if status == 200:
            self.ranged = self.ranged if length is None else False
            size = headers.get("Content-Length", "")
            return Head(0, int(size) if re.fullmatch(r"\d{1,18}", size) else None, version)
        span = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", headers.get("Content-Range", ""))
        if not span or int(span[1]) != start:
            raise Unreachable(f"HTTP 206 of {headers.get('Content-Range')!r}, bytes from {start} on were requested")
        self.ranged = True
        return Head(start, None if span[2] == "*" else int(span[2]), version)


class Fsspec:
    """The protocols of fsspec: s3://, gs://, memory://, ..."""

    ranged: bool | None = True

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = shown(url)
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise UserError(f"{self.url}: {' '.join(str(e).split()).replace(url, self.url)}") from None
        self.filesystem = filesystem
        self.root = root

    @contextmanager
    def open(self, name: str, start: int, length: int | None) -> Iterator[tuple[Head, Iterator[bytes]]]:
        path = f"{self.root.rstrip('/')}/{name}"
        try:
            if length is None:
                self.filesystem.invalidate_cache()  # of what the file was when its folder was listed
                with self.filesystem.open(path, "rb") as f:
                    yield Head(0, None), iter(lambda: f.read(_CHUNK), b"")
            else:
                # by name: s3fs has a version of the file in the second place
                yield Head(start, None), iter([self.filesystem.cat_file(path, start=start, end=start + length)])
        except FileNotFoundError:
            raise Lost("no such file") from None
        except Exception as e:  # each protocol has its own errors, also for a range behind the end
            if length is not None and (size := self._size(path)) is not None and size <= start:
                raise Corrupt(f"truncated: it ends at byte {size}") from None
            raise Unreachable(_cause(e)) from None

    def _size(self, path: str) -> int | None:
        """The size of a file now; None if the backend does not say."""
        try:
            self.filesystem.invalidate_cache()
            size: int | None = self.filesystem.info(path)["size"]
        except Exception:
            return None
        return size


def listing(url: str) -> list[tuple[str, int]]:
    """(URL, size in bytes) of the files that a URL names: one file, a folder or a glob of fsspec's; sorted.

    Raises:
        UserError: an unknown protocol.
        Unreachable: the backend does not answer.
    """
    source = Fsspec(url)
    fs, root = source.filesystem, source.root
    try:
        fs.invalidate_cache()
        about = (fs.glob if "*" in root or "?" in root else fs.find)(root, detail=True)
        files = [(path, info) for path, info in about.items() if info["type"] == "file"]
    except FileNotFoundError:
        return []
    except Exception as e:  # each protocol has its own errors
        raise Unreachable(_cause(e)) from None
    return sorted((fs.unstrip_protocol(path), int(info["size"])) for path, info in files)


class Pipe:
    """`pipe:COMMAND with {}`: the command's output, {} being the file's name. No shell reads it."""

    ranged: bool | None = False

    def __init__(self, url: str, fetch: FetchConfig) -> None:
        self.url = shown(url)
        self._timeout_s = fetch.timeout_s
        try:
            self._words = shlex.split(url.removeprefix("pipe:"))
        except ValueError as e:
            raise UserError(f"{self.url}: {e}") from None
        if not any("{}" in word for word in self._words[1:]):
            raise UserError(
                f"{self.url}: give a command whose words hold {{}}, the file's name, as in pipe:cat /data/{{}}"
            )

    @contextmanager
    def open(self, name: str, start: int, length: int | None) -> Iterator[tuple[Head, Iterator[bytes]]]:
        words = [self._words[0], *(word.replace("{}", name) for word in self._words[1:])]
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
                )
            except OSError as e:
                raise Unreachable(f"{words[0]}: {e.strerror}") from None
            try:
                yield Head(0, None), self._output(process, errors)
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):  # and its child processes
                        os.killpg(process.pid, signal.SIGKILL)
                process.stdout.close()  # type: ignore[union-attr]
                process.wait()

    def _output(self, process: subprocess.Popen[bytes], errors: Any) -> Iterator[bytes]:
        pipe = process.stdout.fileno()  # type: ignore[union-attr]
        poll = select.poll()  # unlike select.select it takes file descriptors above 1023
        poll.register(pipe, select.POLLIN)
        while poll.poll(self._timeout_s * 1000):
            if chunk := os.read(pipe, _CHUNK):
                yield chunk
                continue
            with suppress(subprocess.TimeoutExpired):
                if code := process.wait(self._timeout_s):
                    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 300))
                    raise Unreachable(f"exit code {code}: {' '.join(errors.read().decode(errors='replace').split())}")
                return
            break
        raise Unreachable(f"no output and no end in {self._timeout_s} s")


def _cause(error: BaseException) -> str:
    """The cause of an error in one short line: urllib3 and boto wrap it in objects and addresses."""
    inner = getattr(error, "reason", None)
    error = inner if isinstance(inner, BaseException) else error
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

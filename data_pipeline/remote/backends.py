"""The places that shards lie in: http(s), what fsspec knows (s3://, gs://, ...) and pipe:.

A place opens one file from some byte on and hands out its bytes; how long that may take, and how often it is tried, is
data_pipeline/remote/fetch.py's.
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
    """The place did not answer as it should; it may later."""


class Lost(Exception):
    """The place is there and the file is not, or no longer what the manifest promises."""


class Wrong(Exception):
    """What came is not what the manifest promises. Asked for once more before it is Lost."""


class Head(NamedTuple):
    """What is known before the first byte: where the bytes begin, the size of the whole file (None: not said), and what
    the place says to tell this state of the file from others ("": nothing)."""

    start: int
    total: int | None
    version: str = ""


Opened = AbstractContextManager[tuple[Head, Iterator[bytes]]]


class Place(Protocol):
    """`url` is for messages and holds no secret; `ranged` says whether it can begin in mid-file (None: not known)."""

    url: str
    ranged: bool | None

    def open(self, name: str, start: int, length: int | None) -> Opened:
        """The file's bytes from `start` on, or from 0 where that cannot be; length None asks for all of it.

        Raises Unreachable, Lost, Wrong; also while the bytes are read.
        """
        ...


def is_remote(path: str) -> bool:
    return path.startswith("pipe:") or bool(re.match(r"[a-z][a-z0-9+.]*://", path))


def place(url: str, fetch: FetchConfig) -> Place:
    """Raises UserError for a URL of no known kind, or one whose package is not installed."""
    if url.startswith("pipe:"):
        return Pipe(url, fetch)
    if url.startswith(("http://", "https://")):
        return Http(url, fetch)
    return Fsspec(url)


def shown(url: str) -> str:
    """A place as messages name it: without what may be a secret (user, query, the words of a command)."""
    if url.startswith("pipe:"):
        program = url.removeprefix("pipe:").split(maxsplit=1)
        return f"pipe:{program[0]} ...{' {}' * ('{}' in url)}" if len(program) > 1 else url
    kind, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{kind}://{host.rpartition('@')[2]}{slash}{path}"


def refuse_password(url: str) -> None:
    """Raises UserError for a URL with a password, which the run's folder would show."""
    user, at, _ = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")
    if at and not url.startswith("pipe:") and (":" in user or url.startswith(("http://", "https://"))):
        raise UserError(
            f"{shown(url)}: its URL holds a user or a password, which the run's config.yaml and state.json would show: "
            f"s3:// and gs:// find them in their clients' own files or the environment; for http give "
            f"pipe:COMMAND {{}} with a command that reads them from a file, as curl --netrc does"
        )


class Http:
    def __init__(self, url: str, fetch: FetchConfig) -> None:
        import urllib3

        self.url = shown(url)
        self.ranged: bool | None = None
        try:
            self._parts = urlsplit(url)
        except ValueError as e:
            raise UserError(f"{self.url}: {e}") from None
        never = urllib3.Retry(None, connect=0, read=0, redirect=5, status=0, other=0)  # trying again is fetch.py's
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
        at = head.start
        while chunk := response.read1(_CHUNK):
            yield chunk
            at += len(chunk)
        if at < min(end, head.total or end):  # where the answer declares no length, a cut looks like an end
            raise Unreachable(f"the answer ended at byte {at}, asked for were those up to {end}")

    def _head(self, response: Any, start: int, length: int | None) -> Head:
        status, headers = response.status, response.headers
        if status in (404, 410):
            raise Lost(f"HTTP {status}")
        if status == 416:
            raise Wrong(f"truncated: the server has no byte {start}")
        if status not in (200, 206) or headers.get("Content-Encoding", "identity") != "identity":
            raise Unreachable(f"HTTP {status} {headers.get('Content-Encoding', '')}".strip())
        version = headers.get("ETag") or headers.get("Last-Modified", "")
        if status == 200:
            self.ranged = self.ranged if length is None else False
            size = headers.get("Content-Length", "")
            return Head(0, int(size) if re.fullmatch(r"\d{1,18}", size) else None, version)
        found = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", headers.get("Content-Range", ""))
        if not found or int(found[1]) != start:
            raise Unreachable(f"HTTP 206 of {headers.get('Content-Range')!r} where bytes from {start} on are asked for")
        self.ranged = True
        return Head(start, None if found[2] == "*" else int(found[2]), version)


class Fsspec:
    ranged: bool | None = True

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = shown(url)
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise UserError(f"{self.url}: {' '.join(str(e).split()).replace(url, self.url)}") from None

    @contextmanager
    def open(self, name: str, start: int, length: int | None) -> Iterator[tuple[Head, Iterator[bytes]]]:
        path = f"{self._root.rstrip('/')}/{name}"
        try:
            if length is None:
                with self._fs.open(path, "rb") as f:
                    yield Head(0, None), iter(lambda: f.read(_CHUNK), b"")
            else:
                yield Head(start, None), iter([self._fs.cat_file(path, start, start + length)])
        except FileNotFoundError:
            raise Lost("no such file") from None
        except (Unreachable, Lost, Wrong):
            raise
        except Exception as e:  # each kind of place has its own
            raise Unreachable(_cause(e)) from None


def listing(url: str) -> list[tuple[str, int]]:
    """(URL, size in bytes) of the files that a URL of fsspec's stands for: one file, a folder or a glob; sorted.

    Raises:
        UserError: no known kind of URL.
        Unreachable: the place does not answer.
    """
    found = Fsspec(url)
    fs, root = found._fs, found._root
    try:
        about = (fs.glob if "*" in root or "?" in root else fs.find)(root, detail=True)
        files = [(path, info) for path, info in about.items() if info["type"] == "file"]
    except FileNotFoundError:
        return []
    except Exception as e:  # each kind of place has its own
        raise Unreachable(_cause(e)) from None
    return sorted((fs.unstrip_protocol(path), int(info["size"])) for path, info in files)


class Pipe:
    """`pipe:COMMAND with {}`: the command's output, {} being the file's name. No shell reads it."""

    ranged: bool | None = False

    def __init__(self, url: str, fetch: FetchConfig) -> None:
        self.url, self._timeout_s = shown(url), fetch.timeout_s
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
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, start_new_session=True
                )
            except OSError as e:
                raise Unreachable(f"{words[0]}: {e.strerror}") from None
            try:
                yield Head(0, None), self._output(process, said)
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):  # what it started goes with it
                        os.killpg(process.pid, signal.SIGKILL)
                process.stdout.close()  # type: ignore[union-attr]
                process.wait()

    def _output(self, process: subprocess.Popen[bytes], said: Any) -> Iterator[bytes]:
        pipe = process.stdout.fileno()  # type: ignore[union-attr]
        poll = select.poll()  # unlike select.select it takes file descriptors above 1023
        poll.register(pipe, select.POLLIN)
        while poll.poll(self._timeout_s * 1000):
            if chunk := os.read(pipe, _CHUNK):
                yield chunk
                continue
            with suppress(subprocess.TimeoutExpired):
                if code := process.wait(self._timeout_s):
                    said.seek(max(0, said.seek(0, os.SEEK_END) - 300))
                    raise Unreachable(f"exit code {code}: {' '.join(said.read().decode(errors='replace').split())}")
                return
            break
        raise Unreachable(f"no output and no end in {self._timeout_s} s")


def _cause(error: BaseException) -> str:
    """One short line: urllib3 and boto wrap what happened in objects and addresses."""
    inner = getattr(error, "reason", None)
    error = inner if isinstance(inner, BaseException) else error
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

"""The WARC file that one task fills with pages, so that none is asked for twice (WARC 1.1, one gzip member a record).

For each link a `metadata` record holds its verdict as JSON, after the `response` record where there is a page:

    {"link", "outcome", "url", "status", "bytes"}     outcome: "fetched", or why not; url: where redirects led

Both are one write, made to last before the next. A killed task leaves at most one such write in part; it is cut off.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from conf.errors import UserError
from data_pipeline.prepare.web.http import Answer

_HEAD = 1 << 16  # bytes of a record that are looked at: a verdict is shorter
_DROPPED = ("transfer-encoding", "content-length", "connection", "keep-alive")  # of the way that the page came


class PageArchive:
    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._lock = file, threading.Lock()

    def add(self, verdict: dict[str, Any], answer: Answer | None = None) -> None:
        """
        Raises:
            OSError: such as a full disk; what is in the file stays.
        """
        page = b"" if answer is None else _packed(*_response(verdict["url"], answer))
        record = page + _packed("metadata", verdict.get("link"), "application/json", json.dumps(verdict).encode())
        with self._lock:
            self._file.write(record)
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def opened(path: Path, about: dict[str, Any], longest: int) -> Iterator[tuple[PageArchive, list[dict[str, Any]]]]:
    """The archive, held, and the verdicts that are in it.

    Args:
        about: stands in the `warcinfo` record of a new file.
        longest: bytes that one write may have; what is broken over more is no write of a killed task.

    Raises:
        UserError: another process holds it, or it is damaged.
    """
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process fetches these pages: wait for it") from None
        verdicts, end = [], 0
        file.seek(0)
        for head, at in _members(file):
            kind, _, body = head.partition(b"\r\n\r\n")
            if b"\r\nWARC-Type: response\r\n" in kind:
                continue  # whole only with its verdict
            end = at
            if b"\r\nWARC-Type: metadata\r\n" in kind:
                verdicts.append(json.loads(body))
        size = file.seek(0, os.SEEK_END)
        if size - end > longest:
            raise UserError(f"{path}: damaged from byte {end} on: delete it, and its pages are fetched again")
        file.truncate(end)
        if not end:
            fields = "".join(f"{key}: {value}\r\n" for key, value in about.items())
            file.write(_packed("warcinfo", None, "application/warc-fields", fields.encode()))
            file.flush()
        os.fsync(file.fileno())
        yield PageArchive(file), verdicts


def _members(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """(the beginning, where it ends in the file) of each whole gzip member, up to the first broken one."""
    at, chunk = 0, file.read(1 << 16)
    while chunk:
        member, head = zlib.decompressobj(31), b""
        try:
            while not member.eof:
                if not chunk:
                    return
                out = member.decompress(chunk, 1 << 20)
                head += out[: _HEAD - len(head)]
                rest = member.unused_data if member.eof else member.unconsumed_tail
                at += len(chunk) - len(rest)
                chunk = rest or file.read(1 << 16)
        except zlib.error:
            return
        yield head, at


def _response(url: str, answer: Answer) -> tuple[str, str, str, bytes, str]:
    kept = [(key, value) for key, value in answer.headers if key.lower() not in _DROPPED]
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{key}: {value}" for key, value in kept)]
    lines.append(f"Content-Length: {len(answer.body)}")
    head = "\r\n".join(" ".join(line.splitlines()) for line in lines)
    block = head.encode("latin-1", "replace") + b"\r\n\r\n" + answer.body
    return "response", url, "application/http; msgtype=response", block, answer.ip


def _packed(kind: str, url: str | None, content: str, block: bytes, ip: str | None = None) -> bytes:
    from fastwarc.warc import WarcRecord, WarcRecordType

    record = WarcRecord()
    record.init_headers(getattr(WarcRecordType, kind))
    record.headers["WARC-Date"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    record.headers["Content-Type"] = content
    for key, value in (("WARC-Target-URI", url), ("WARC-IP-Address", ip)):
        if value:
            record.headers[key] = value
    record.set_bytes_content(block)
    plain = io.BytesIO()
    record.write(plain, checksum_data=True)
    return gzip.compress(plain.getvalue(), 6, mtime=0)

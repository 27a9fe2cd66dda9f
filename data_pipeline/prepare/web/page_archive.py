"""The WARC file that one task fills with pages, so that none is fetched twice (WARC 1.1, one gzip member a record).

For each link a `metadata` record holds its verdict as JSON, after the `response` record if there is a page:

    {"link", "outcome", "url", "status", "bytes"}     outcome: "fetched", or why not; url: the end of the redirects

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
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from conf.errors import UserError
from data_pipeline.prepare.warc.compression import gzip_members
from data_pipeline.prepare.web.http import Answer

_GZIP = b"\x1f\x8b\x08"  # how a member begins
_HEAD = 1 << 16  # bytes of a record that are read: a verdict is shorter
_DROPPED = ("transfer-encoding", "content-length", "connection", "keep-alive")  # headers of the transfer, not the page


class PageArchive:
    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._lock = threading.Lock()

    def add(self, verdict: dict[str, Any], answer: Answer | None = None) -> None:
        """
        Raises:
            OSError: such as a full disk; the records before stay.
        """
        page = b"" if answer is None else _response(verdict["url"], answer)
        record = page + _packed("metadata", verdict.get("link"), "application/json", json.dumps(verdict).encode())
        with self._lock:
            self.file.write(record)
            self.file.flush()
            os.fsync(self.file.fileno())


@contextmanager
def open_archive(path: Path, about: dict[str, Any], longest: int) -> Iterator[tuple[PageArchive, list[dict[str, Any]]]]:
    """The archive, locked, and the verdicts that are in it.

    Args:
        about: fields of the `warcinfo` record of a new file.
        longest: bytes that one write may have; a longer broken end is no write of a killed task.

    Raises:
        UserError: another process holds it, it is damaged, or it is none.
    """
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process fetches these pages: wait for it") from None
        verdicts, end, size = [], 0, file.seek(0, os.SEEK_END)
        file.seek(0)
        if not _GZIP.startswith(file.read(len(_GZIP))):
            raise UserError(f"{path}: no archive of pages: move it away")
        for head, member_end in _members(file, size):
            kind, _, body = head.partition(b"\r\n\r\n")
            if b"\r\nWARC-Type: response\r\n" in kind:
                continue  # whole only with its verdict
            end = member_end
            if b"\r\nWARC-Type: metadata\r\n" in kind:
                verdicts.append(json.loads(body))
        if size - end > longest:
            raise UserError(f"{path}: damaged from byte {end} on: delete it, and its pages are fetched again")
        file.truncate(end)
        if not end:
            fields = "".join(f"{key}: {value}\r\n" for key, value in about.items())
            file.write(_packed("warcinfo", None, "application/warc-fields", fields.encode()))
            file.flush()
        os.fsync(file.fileno())
        yield PageArchive(file), verdicts


def _members(file: IO[bytes], size: int) -> Iterator[tuple[bytes, int]]:
    """(first bytes, end in the file) of each whole gzip member, up to the first broken one."""
    archive, end = gzip_members(file, size), 0
    with suppress(EOFError, zlib.error):
        while end < size:
            head = b""
            for data in archive.inflate(end):
                head += data[: _HEAD - len(head)]
            end = archive.end
            yield head, end


def _response(url: str, answer: Answer) -> bytes:
    kept = [(key, value) for key, value in answer.headers if key.lower() not in _DROPPED]
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{key}: {value}" for key, value in kept)]
    lines.append(f"Content-Length: {len(answer.body)}")
    head = "\r\n".join(" ".join(line.splitlines()) for line in lines)
    block = head.encode("latin-1", "replace") + b"\r\n\r\n" + answer.body
    return _packed("response", url, "application/http; msgtype=response", block, answer.ip)


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

"""One record of a web archive to a document."""

from __future__ import annotations

import io
import re
import zlib
from codecs import BOM_UTF8
from dataclasses import dataclass
from functools import partial

from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.lines import GZIP, Codec, Damaged, TrailingBytes, decompressed, zstd
from data_pipeline.prepare.warc.byte_stream import BOMB, MIB
from data_pipeline.prepare.warc.charset import decode

TOO_LARGE = "it is larger than limits.page_mib"
EMPTY, NOT_HTTP, NOT_OK = "empty", "not an HTTP response", "an HTTP status other than 200"
NOT_WEB, NOT_TEXT = "a file not of the web", "neither HTML nor plain text"
BAD_ENCODING = "its Content-Encoding cannot be undone"
TRAILING = "bytes of another kind follow its Content-Encoding's end"
HTTP_WINDOW = 1 << 23  # bytes of zstd's window (RFC 9659)
WRAPPED, DEFLATE = (Codec(re.compile(rb"(?!)"), partial(zlib.decompressobj, b), zlib.error, 1 << 14) for b in (15, -15))
TYPES = ("warcinfo", "request", "metadata", "revisit", "continuation")
PAGES = ("text/html", "application/xhtml+xml")
BINARY = (b"%PDF", b"\x89PNG", b"GIF8", b"\xff\xd8\xff", b"PK\3\4", b"\x1f\x8b", b"RIFF", b"Rar!", b"\xd0\xcf\x11\xe0")
TAG = re.compile(rb"<(!doctype html|html|head|body|title|meta|p|div|table|span|a|br|h\d)\b", re.IGNORECASE)
ROOT = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]{0,200}>\s*)?<(!doctype html|html|head|body)\b", re.IGNORECASE)
END_OF_HEADER = re.compile(rb"\r?\n\r?\n")
CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s\"';,]+)", re.IGNORECASE)
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
ARC = re.compile(r"(.+?) [0-9a-f.:]+ (\d{14}) (\S*)(?: .*)? (\d{1,15})\s*", re.IGNORECASE)
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


@dataclass(frozen=True, slots=True)
class Header:
    type: str
    length: int | None  # None = not given
    url: str | None = None
    date: str | None = None  # ISO 8601
    id: str | None = None
    mime: str = ""
    unix: bool = False  # its lines end with LF, not CRLF


def parse_header(held: bytearray, start: int, end: int) -> tuple[Header | None, int]:
    """The header of the record that starts at held[start], and its bytes; None (of 1 byte) if it does not end."""
    if held[start : start + 5].upper() != b"WARC/":
        line = held.index(b"\n", start) + 1
        return _arc(held[start:line].decode("utf-8", "replace")), line - start
    blank = END_OF_HEADER.search(held, start, end)
    if blank is None:
        return None, 1
    _, fields = _fields(held[start : blank.start()].decode("utf-8", "replace"))
    length, date = fields.get("content-length", ""), fields.get("warc-date", "")
    header = Header(
        type=fields.get("warc-type", "").lower(),
        length=int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None,
        url=fields.get("warc-target-uri", "").strip("<>") or None,
        date=date if DATE.fullmatch(date) else None,
        id=fields.get("warc-record-id", "").strip("<>") or None,
        mime=_mime(fields),
        unix=b"\r" not in blank[0],
    )
    return header, blank.end() - start


def _arc(line: str) -> Header:
    """Header of a line of URL, IP address, date, type and length; version 2 has more before the length."""
    parts = ARC.fullmatch(line)
    if not parts:
        return Header("", None)
    url, day, mime, length = parts.groups()
    date = f"{day[:4]}-{day[4:6]}-{day[6:8]}T{day[8:10]}:{day[10:12]}:{day[12:]}Z"
    kind = "warcinfo" if url.startswith("filedesc:") else "response"
    return Header(kind, int(length), url, date, mime=mime.lower())


def _fields(text: str) -> tuple[str, dict[str, str]]:
    """The first line, and the fields by their names in lower case; a repeated field has all its values."""
    first, *lines = text.split("\n")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            name, value = name.strip().lower(), value.strip()
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return first.strip(), fields


def _mime(fields: dict[str, str]) -> str:
    return re.split("[;,]", fields.get("content-type", ""), maxsplit=1)[0].strip().lower()


def document(header: Header, content: bytes, limit: int, ratio: float, source: str, path: str) -> Document | Dropped:
    """The document of a record, or why it is none.

    `limit` bytes may come out of a Content-Encoding, and `ratio` times its input if that is more than 1 MiB.
    """
    mime, charset = header.mime, None
    if header.type == "response":
        http = END_OF_HEADER.search(content, 0, 1 << 16)
        if not content.startswith(b"HTTP/") or not http:
            return Dropped(NOT_HTTP, path)
        status, fields = _fields(content[: http.start()].decode("latin-1"))
        if status.split()[1:2] != ["200"]:
            return Dropped(NOT_OK, path)
        mime, content = _mime(fields), content[http.end() :]
        charset = CHARSET.search(fields.get("content-type", ""))
        if mime and mime not in PAGES and mime != "text/plain":
            return Dropped(NOT_TEXT, path)
        body = decoded(content, fields, limit, ratio)
        if isinstance(body, str):
            return Dropped(body, path)
        content = body
    elif header.type == "resource" and not (header.url or "").startswith(("http:", "https:")):
        return Dropped(NOT_WEB, path)  # as the logs that wget keeps
    elif header.type not in ("resource", "conversion"):
        return Dropped(f"a {header.type} record" if header.type in TYPES else "a record of another type", path)
    return _text(header, content, mime, charset[1] if charset else None, source, path)


def _text(header: Header, content: bytes, mime: str, charset: str | None, source: str, path: str) -> Document | Dropped:
    if not content.strip():
        return Dropped(EMPTY, path)
    if content.startswith(b"\0\0"):
        content = content.lstrip(b"\0")
    head = content[:1024]
    zeros = b"\0" in head and not _utf16(content) and not TAG.search(head)
    if content.startswith(BINARY) or zeros:
        return Dropped(NOT_TEXT, path)
    metadata: dict[str, object] = {"url": header.url, "date": header.date, "source": source, "path": path}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    text = ""
    if header.type == "conversion" or (mime == "text/plain" and not ROOT.match(content)):
        text = decode(content, charset)
        if not text.strip():
            return Dropped(EMPTY, path)
    elif mime in PAGES or ROOT.match(content):
        metadata["html"] = content
        if charset:
            metadata["charset"] = charset
    else:
        return Dropped(NOT_TEXT, path)
    return Document(text, header.id or path, metadata=metadata)


def _utf16(content: bytes) -> bool:
    return content[:2] in (b"\xff\xfe", b"\xfe\xff") or content[:4] in (b"<\0!\0", b"<\0h\0", b"\0<\0!", b"\0<\0h")


def decoded(payload: bytes, fields: dict[str, str], limit: int, ratio: float) -> bytes | str:
    """The payload with Transfer-Encoding and Content-Encoding undone, or why they cannot be.

    Archives may keep the header of an encoding that they have undone: bytes that are not of that encoding are left.
    """
    if "chunked" in fields.get("transfer-encoding", "").lower():
        payload = _unchunked(payload)
    codings = [name.strip().lower() for name in fields.get("content-encoding", "").split(",")]
    for coding in reversed(codings[:4]):
        data = _expanded(payload, coding, limit)
        if isinstance(data, str):
            return data
        if len(data) > MIB and len(data) > ratio * len(payload):
            return BOMB
        if len(data) > limit:
            return TOO_LARGE
        payload = data
    return payload


def _unchunked(payload: bytes) -> bytes:
    parts: list[bytes] = []
    start = 0
    while chunk := CHUNK.match(payload, start):
        size = int(chunk[1], 16)
        if not size:
            return b"".join(parts)
        parts.append(payload[chunk.end() : chunk.end() + size])
        start = chunk.end() + size
        start += 2 if payload[start : start + 2] == b"\r\n" else payload[start : start + 1] == b"\n"
    return b"".join(parts) if parts and start >= len(payload) else payload


def _expanded(payload: bytes, coding: str, limit: int) -> bytes | str:
    """All members of a payload, up to `limit` bytes and a little more, or why they cannot be had."""
    if coding in ("", "identity") or not payload:
        return payload
    try:
        data = _unbrotlied(payload, limit) if coding == "br" else _unpacked(payload, coding, limit)
    except TrailingBytes:
        data, fault = None, TRAILING
    except Damaged:
        data, fault = None, BAD_ENCODING
    if data is None:
        return payload if _is_html(payload) else fault
    return data


def _is_html(payload: bytes) -> bool:
    head = payload[: 1 << 12].removeprefix(BOM_UTF8)
    return head.lstrip()[:1] == b"<" and TAG.search(head) is not None


def _unpacked(payload: bytes, coding: str, limit: int) -> bytes:
    if coding in ("gzip", "x-gzip"):
        codec = GZIP
    elif coding == "zstd":
        codec = zstd(HTTP_WINDOW)
    elif coding == "deflate":
        codec = WRAPPED if payload[0] & 15 == 8 and int.from_bytes(payload[:2], "big") % 31 == 0 else DEFLATE
    else:
        raise Damaged("an encoding that is not known")
    data = bytearray()
    for piece in decompressed(io.BytesIO(payload), codec):
        data += piece
        if len(data) > limit:
            break
    return bytes(data)


def _unbrotlied(payload: bytes, limit: int) -> bytes:
    import brotli

    unzip = brotli.Decompressor()  # a payload is one stream
    try:
        data: bytes = unzip.process(payload, output_buffer_limit=limit + 1)
    except brotli.error as e:
        raise Damaged(str(e)) from None
    if not unzip.is_finished() and len(data) <= limit:
        raise Damaged("it is cut off")
    return data

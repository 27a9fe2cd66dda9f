"""The kind of a file, seen in its first bytes: a file of another kind than the corpus is refused by name, not read."""

from __future__ import annotations

import codecs
import json
import re

HEAD = 1 << 16  # bytes that are looked at
BOMS = {  # the longer ones first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
JSON_NAME = re.compile(r"\.(json|jsonl|ndjson|jsonlines)(\.\w+)?$", re.IGNORECASE)
TABLE_NAME = re.compile(r"\.(csv|tsv)(\.\w+)?$", re.IGNORECASE)
HTML = re.compile(rb"(<\?xml[^>]{0,200}>\s*|<!--.{0,999}?-->\s*)*<(!doctype html|html|head|body)\b", re.I | re.S)
LINES, ARRAY = (
    "JSON lines: corpus=jsonl reads them",
    "JSON that is not one document a line: make it so for corpus=jsonl",
)
WIDE = "JSON in UTF-16: make it UTF-8 (iconv -f utf-16 -t utf-8)"
TEXT = "text"
_MAGIC = {
    b"PAR1": "a Parquet table: corpus=parquet reads it",
    b"WARC/": "a web archive: corpus=common_crawl reads it",
    b"PK\3\4": "a ZIP: corpus=books reads EPUBs, unpack any other",
    b"%PDF": "a PDF: extract its text",
    b"ARROW1": "an Arrow file: write it as Parquet for corpus=parquet",
    b"\xff\xff\xff\xff\x10\0\0\0": "an Arrow stream: write it as Parquet for corpus=parquet",
    b"MMIDIDX": "Megatron's index of token ids: data_pipeline.shards import reads it",
}
_PAGE = "an HTML page: corpus=common_crawl reads pages in web archives"
_TAR = "a tar: unpack it"
_TABLE = "a table of separated values: write it as JSON lines or Parquet"


def kind_of(head: bytes, name: str) -> str:
    """The kind of a file that begins with `head`, and what reads it; TEXT for all that is no other known kind.

    Args:
        head: its first HEAD bytes, decompressed, or all.
        name: tells a table of separated values, and whether braces begin JSON.
    """
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return _TAR
    if HTML.match(head.removeprefix(codecs.BOM_UTF8).lstrip()):
        return _PAGE
    if TABLE_NAME.search(name):
        return _TABLE
    return _kind_of_json(head, name) or TEXT


def _kind_of_json(head: bytes, name: str) -> str | None:
    named = JSON_NAME.search(name) is not None
    if named and charset_of(head) != "utf-8":
        return WIDE
    first, end, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    whole = bool(end) or len(head) < HEAD
    if (named and first.strip() == b"{") or (first[:1] == b"[" and (named or _parses(first)) and b"{" in head):
        return ARRAY
    if named or (first[:1] == b"{" and (_parses(first) if whole else re.match(rb'\{\s*"', first))):
        return LINES
    return None


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def charset_of(data: bytes | bytearray) -> str:
    """The encoding that a byte order mark tells, or else UTF-8."""
    return next((charset for bom, charset in BOMS.items() if data.startswith(bom)), "utf-8")

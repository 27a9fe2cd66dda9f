"""EPUB -> text: the XHTML files of the spine, in its order, a blank line between paragraphs (EPUB 3.3).

A book is a ZIP from an unknown author: it is read, never extracted; no link out of it is followed; entities are not
resolved; and the size that it may unpack to is bounded.
"""

from __future__ import annotations

import errno
import html
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any
from urllib.parse import unquote, urlsplit

MAX_DIRECTORY = 4 << 20  # bytes of the ZIP's directory: about 40,000 entries
MAX_TEXT = 32 << 20  # bytes of XML that one book may unpack to
MAX_TAGS = 1 << 21  # of one file: a parsed one takes 100 bytes and more
MAX_RATIO = 200  # of a member above 1 MiB, to what it takes in the ZIP

_OBFUSCATION = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")  # of fonts: no text is hidden
_BLOCKS = re.compile(
    "address|article|aside|blockquote|body|caption|center|d[dlt]|details|div|fieldset|figcaption|figure|footer|form|"
    "h[1-6]|header|hgroup|hr|li|main|[ou]l|p|pre|section|table|tbody|tfoot|thead|tr"
)
_SKIPPED = (
    "head",
    "script",
    "style",
    "template",
    "noscript",
    "svg",
    "math",
    "nav",
    "audio",
    "video",
    "object",
    "iframe",
)


class BadBook(Exception):
    """A book that gives no text. Its message is the reason, without numbers: equal reasons are counted together."""


def text_of(path: Path) -> str:
    """The text of a book, its chapters separated by blank lines.

    Raises:
        BadBook: it is no EPUB, is encrypted, damaged, or unpacks to too much.
        OSError: it cannot be read.
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            return "\n\n".join(filter(None, (_text(chapter) for chapter in _Book(archive).spine())))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, ValueError):
        raise BadBook("a damaged EPUB") from None
    except OSError as e:
        if e.errno != errno.EINVAL:  # a seek to before the start of the file
            raise
        raise BadBook("a damaged EPUB") from None


class _Book:
    """The files of a book; `left` is the number of bytes that they may still unpack to."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.left = MAX_TEXT

    def spine(self) -> list[bytes]:
        if "META-INF/encryption.xml" in self.archive.namelist():
            methods = _xml(self.read("META-INF/encryption.xml")).iterfind(".//{*}EncryptionMethod")
            if any(method.get("Algorithm") not in _OBFUSCATION for method in methods):
                raise BadBook("an encrypted EPUB")
        root = _xml(self.read("META-INF/container.xml")).find(".//{*}rootfile")
        package = _inside("", "" if root is None else root.get("full-path", ""))
        opf = _xml(self.read(package))
        hrefs = {item.get("id"): item for item in opf.iterfind("{*}manifest/{*}item")}
        chapters = []
        for ref in opf.iterfind("{*}spine/{*}itemref"):
            item = hrefs.get(ref.get("idref"))
            kind = "" if item is None else item.get("media-type", "")
            if item is not None and ref.get("linear") != "no" and kind in ("application/xhtml+xml", "text/html"):
                chapters.append(self.read(_inside(package, item.get("href", ""))))
        if not chapters:
            raise BadBook("an EPUB without text in its spine")
        return chapters

    def read(self, name: str) -> bytes:
        try:
            info = self.archive.getinfo(name)
        except KeyError:
            raise BadBook("an EPUB that lacks a file which it names") from None
        if info.flag_bits & 1:
            raise BadBook("an encrypted EPUB")
        if stat.S_ISLNK(info.external_attr >> 16):  # its content is a path
            raise BadBook("an EPUB with a link in place of a file")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadBook("an EPUB packed in a way that EPUB does not know")
        with self.archive.open(info) as stream:
            body = stream.read(self.left + 1)  # no more, whatever the directory says
        self.left -= len(body)
        if self.left < 0 or body.count(b"<") > MAX_TAGS or len(body) > max(1 << 20, MAX_RATIO * info.compress_size):
            raise BadBook("an EPUB that unpacks to too much")
        return body


def _check_directory(path: Path) -> None:
    """Check the size of the ZIP's directory before zipfile reads all of it into memory."""
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - (1 << 16) - 42))
        tail = f.read()
    end = len(tail) - 22 if tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0" else tail.rfind(b"PK\5\6")
    if end < 0:
        raise BadBook("not an EPUB")
    if (
        tail[max(0, end - 20) : end].startswith(b"PK\6\7")
        or struct.unpack_from("<I", tail, end + 12)[0] > MAX_DIRECTORY
    ):
        raise BadBook("an EPUB of too many files")


def _inside(package: str, href: str) -> str:
    """The name in the ZIP of the file that `package` refers to as `href`."""
    name = normpath(join(dirname(package), unquote(urlsplit(href).path)))
    if not href or urlsplit(href).scheme or href.startswith("/") or name.startswith(("/", "../")) or name == "..":
        raise BadBook("an EPUB that names a file outside of it")
    return name


def _xml(body: bytes) -> Any:
    from lxml import etree

    try:
        return etree.fromstring(body, etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False))
    except (etree.XMLSyntaxError, ValueError):
        raise BadBook("a damaged EPUB") from None


def _text(body: bytes) -> str:
    """The text of one XHTML file. A file that is no XML is read as HTML (which reads `<title/>` as an open tag)."""
    from lxml import etree

    try:
        root = _xml(re.sub(rb"&([A-Za-z][A-Za-z0-9]{1,30});", _number, body))
    except BadBook:
        root = etree.fromstring(body, etree.HTMLParser(no_network=True, encoding=None)) if body.strip() else None
    if root is None:
        return ""
    silent = (etree.Comment, etree.ProcessingInstruction, etree.Entity)
    etree.strip_elements(root, *silent, *(f"{{*}}{tag}" for tag in _SKIPPED), with_tail=False)
    parts: list[str] = []
    for event, element in etree.iterwalk(root, ("start", "end")):
        tag = etree.QName(element).localname.lower()
        if _BLOCKS.fullmatch(tag):
            parts.append("\n\n")
        elif event == "end" and tag in ("br", "td", "th"):
            parts.append("\n" if tag == "br" else " ")
        parts.append(re.sub(r"\s+", " ", (element.text if event == "start" else element.tail) or ""))
    lines = (re.sub(r" {2,}", " ", line).strip() for line in "".join(parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _number(entity: re.Match[bytes]) -> bytes:
    """&nbsp; as &#160;: without a DTD, which is not read, XML has five named entities."""
    name = entity[1].decode()
    if name in ("amp", "lt", "gt", "quot", "apos"):
        return entity[0]
    known = html.unescape(f"&{name};")
    return entity[0] if known.startswith("&") else "".join(f"&#{ord(c)};" for c in known).encode()

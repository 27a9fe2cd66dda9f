"""Bytes of a page to text, as a browser decodes them, but also for pages that declare a wrong charset."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
WIDER = {
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "iso8859-11": "cp874",
}  # what these names mean on the web (WHATWG Encoding Standard)
NON_ASCII = bytes(range(128, 256))
LOST = "\N{REPLACEMENT CHARACTER}"


def decode(html: bytes, charset: str | None) -> str:
    """The text of `html`; `charset` is that of the HTTP header. Bytes that are no character become U+FFFD.

    Zeros vanish, as in a browser. A byte order mark decides, or the zeros of UTF-16; then UTF-8, if the bytes are that,
    whatever is declared; then the charset of the HTTP header, of the page's own meta tag, and a guess from the bytes:
    the first that fits all bytes, or else the one that loses the fewest.
    """
    for bom, name in BOMS:
        if html.startswith(bom):
            return html[len(bom) :].decode(name, "replace").replace("\0", "")
    if b"\0" in html:
        zeros = _zeros(html)
        if max(zeros) > len(html.rstrip(b"\0")) // 4:
            return html.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le", "replace").replace("\0", "")
        if not max(zeros):
            html = html.replace(b"\0", b"")
    return _by_charset(html, charset).replace("\0", "")


def _zeros(html: bytes) -> tuple[int, int]:
    """Zeros at even and at odd bytes, if nearly all are at the one or the other, as UTF-16 has them; else (0, 0).

    Zeros that fill a page up are at both.
    """
    text = html.rstrip(b"\0")
    even, odd = text[::2].count(0), text[1::2].count(0)
    return (even, odd) if max(even, odd) > 8 * min(even, odd) else (0, 0)


def _by_charset(html: bytes, charset: str | None) -> str:
    if (text := _utf8(html)) is not None:
        return text
    best = None
    for name in _guesses(html, charset):
        text = html.decode(name, "replace")
        if best is None or text.count(LOST) < best.count(LOST):
            best = text
        if LOST not in text:
            break
    return best or ""


def _utf8(html: bytes) -> str | None:
    """The text if it is UTF-8: most of what is not ASCII is well formed, which no other charset has by accident."""
    if html.isascii():  # ISO-2022-JP, UTF-16 of English?
        return html.decode("ascii") if b"\x1b" not in html and b"\0" not in html else None
    try:
        return html.decode("utf-8")
    except UnicodeDecodeError:
        text = html.decode("utf-8", "replace")
    lost = text.count(LOST)
    formed = len(text) - len(html.translate(None, NON_ASCII)) - lost
    return text if formed > lost else None


def _guesses(html: bytes, charset: str | None) -> Iterator[str]:
    """Python's names of charsets that may be the page's; each is only made if the one before did not fit."""
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    zeros = b"\0" in html
    declared = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    if declared and zeros >= declared.startswith("utf-16"):  # markup in UTF-16 has zeros: without them it is wrong
        yield WIDER.get(declared, declared)
    for from_meta in (True, False):
        name = detect_encoding(html, from_html_meta=from_meta)
        if name and zeros >= name.startswith("utf-16"):
            yield WIDER.get(name, name)
    yield "cp1252"

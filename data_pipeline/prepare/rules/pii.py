"""Masks of personal data: e-mail addresses, IP addresses and telephone numbers become ones that are nobody's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address

from datatrove.pipeline.formatters.pii import PIIFormatter
from xxhash import xxh3_64_intdigest

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import PiiConfig
from data_pipeline.prepare.step import Step

Span = tuple[int, int]

LONGEST_LOCAL = 256  # characters before the @; RFC 5321 has 64
ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
IPV4 = re.compile(rf"(?:{OCTET}\.){{3}}{OCTET}")
LOCAL = re.compile(rf"\b{ATEXT}+(?:\.{ATEXT}+)*\Z")
DOMAIN = re.compile(rf"@(?:(?:{LABEL}\.)+{LABEL}|\[(?:{OCTET}\.){{3}}(?:{OCTET}|{LABEL}:)\])")
PHONE = re.compile(
    r"(?<![\w+.-])(?!\+[0-9]{16})(?:\+[1-9][0-9]{0,2}(?:[ .-]?\(?[0-9]{1,4}\)?){2,5}"
    r"|(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4})(?![\w-])"
)
FICTION = tuple(f"202-555-01{n}" for n in (17, 34, 52, 69, 81, 96))  # numbers kept free for stories: 555-0100 to 0199


class Pii(Step):
    """Masks what datatrove's PIIFormatter masks in FineWeb's recipe, with the same replacements: e-mail addresses, and
    IP addresses that are public. The document's id and the position alone choose the replacement; datatrove takes one
    after the other.

    Telephone numbers, which FineWeb leaves, are masked if they are written as such: international ones that begin
    with + and have 8 to 15 digits, and North American ones in groups of 3, 3 and 4 (212-555-1234, (212) 555-1234).
    """

    rewrites = True

    def __init__(self, config: PiiConfig) -> None:
        super().__init__("pii")
        peer = PIIFormatter()
        emails, ips = peer.emails_replacer.replacements, peer.ip_replacer.replacements
        masks: list[tuple[bool, Callable[[str], Iterator[Span]], tuple[str, ...]]] = [
            (config.email, emails_in, emails),
            (config.ip, ips_in, ips),
            (config.phone, phones_in, FICTION),
        ]
        self.masks = [(find, others) for wanted, find, others in masks if wanted]

    def reason(self, doc: Document) -> str | None:
        for find, others in self.masks:
            doc.text = masked(doc.text, find(doc.text), others, doc.id)
        return None


def masked(text: str, spans: Iterator[Span], others: tuple[str, ...], name: str) -> str:
    """`text` with each span [start, end) replaced by one of `others`."""
    pieces, done = [], 0
    for start, end in spans:
        pick = xxh3_64_intdigest(f"{name} {start}".encode("utf-8", "surrogatepass")) % len(others)
        pieces += [text[done:start], others[pick]]
        done = end
    return "".join((*pieces, text[done:])) if pieces else text


def emails_in(text: str) -> Iterator[Span]:
    """Spans around each @: datatrove's expression, from the left, takes quadratic time on a long word."""
    sign, end = text.find("@"), 0
    while sign >= 0:
        domain = DOMAIN.match(text, sign)
        local = LOCAL.search(text, max(end, sign - LONGEST_LOCAL), sign) if domain else None
        if domain and local:
            end = domain.end()
            yield local.start(), end
        sign = text.find("@", max(sign + 1, end))


def ips_in(text: str) -> Iterator[Span]:
    return (match.span() for match in IPV4.finditer(text) if is_public(match.group()))


def is_public(ip: str) -> bool:
    try:
        return ip_address(ip).is_global
    except ValueError:  # 01.2.3.4
        return False


def phones_in(text: str) -> Iterator[Span]:
    for match in PHONE.finditer(text):
        if not match.group().startswith("+") or 8 <= sum(map(str.isdigit, match.group())) <= 15:
            yield match.span()

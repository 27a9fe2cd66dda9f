"""Refused URLs: by their domain, or by a word in them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import UrlConfig
from data_pipeline.prepare.rules import lists
from data_pipeline.prepare.step import Step

HOST = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|[0-9a-f:.]*:[0-9a-f:.]*")  # the second is IPv6
WORD = re.compile(r"[a-z0-9]+")
LONGEST_HOST = 253  # characters, of DNS


class Urls(Step):
    """Drops a document whose URL is no web address, lies on a blocked domain or below it, or has a blocked word.
    A document without a URL stays."""

    def __init__(self, config: UrlConfig) -> None:
        super().__init__("url")
        self.domains = lists.Domains.of(config.domains, config.blocklists, "url.blocklists")
        self.words = frozenset[str]().union(*(lists.words(path, "url.words") for path in config.words))

    def reason(self, doc: Document) -> str | None:
        url = doc.metadata.get("url")
        if url is None:
            return None
        host = host_of(url)
        if host is None:
            return "malformed url"
        if self.domains.cover(host):
            return "domain"
        if self.words and not self.words.isdisjoint(WORD.findall(url.lower())):
            return "hard_blacklisted"  # datatrove's name for it
        return None


def host_of(url: str) -> str | None:
    """The host of an http or https URL: lower case, ASCII (IDNA), without a dot at its end; or None."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").removesuffix(".")
        _ = parts.port  # which must be a number, or nothing
        if not host.isascii():
            host = host.encode("idna").decode()
    except ValueError:  # UnicodeError is one
        return None
    good = parts.scheme in ("http", "https") and len(host) <= LONGEST_HOST and HOST.fullmatch(host)
    return host if good else None

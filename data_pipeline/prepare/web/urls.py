"""URLs in one normal form, so that equal ones compare equal (RFC 3986, section 6.2.2)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import quote, urlsplit

LONGEST = 2048  # characters of a URL
PORTS = {"http": 80, "https": 443}
_UNRESERVED = re.compile("%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")  # RFC 3986: need no escape
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")
_SAFE = "%/:=&?~+!$,;'@()*"  # in a path or query: reserved, or escaped already


class Url(NamedTuple):
    """Parts of a normal URL; `port` is None if it is the scheme's own."""

    scheme: str
    host: str
    port: int | None
    path: str
    query: str

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.host}" + (f":{self.port}" if self.port else "")

    @property
    def target(self) -> str:
        return self.path + (f"?{self.query}" if self.query else "")

    def __str__(self) -> str:
        return self.origin + self.target

    @property
    def key(self) -> int:
        """64 bits that are the same for http and https, with www. and without, with a slash at the end and without."""
        same = f"{self.host.removeprefix('www.')}:{self.port or ''}{self.path.rstrip('/')}?{self.query}"
        return int.from_bytes(hashlib.blake2b(same.encode(), digest_size=8).digest(), "little")


def normalize(url: str) -> Url | None:
    """The URL without user, fragment and its scheme's own port, in lower case and escaped as RFC 3986 says; None for
    a URL that is not http or https."""
    import idna

    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
        if not host.isascii():
            host = idna.encode(host, uts46=True).decode()
    except ValueError:  # idna.IDNAError is one
        return None
    if ":" in host:
        host = f"[{host}]"
    if parts.scheme not in PORTS or len(url) > LONGEST or not _HOST.fullmatch(host):
        return None
    path = _escaped(_resolved(_UNRESERVED.sub(lambda m: chr(int(m[1], 16)), parts.path)))
    normal = Url(parts.scheme, host, None if port == PORTS[parts.scheme] else port, path, _escaped(parts.query))
    return normal if len(str(normal)) <= LONGEST else None


def _escaped(part: str) -> str:
    part = re.sub("%(?![0-9A-Fa-f]{2})", "%25", part)
    return re.sub("%..", lambda escape: escape[0].upper(), quote(part.encode(errors="surrogatepass"), safe=_SAFE))


def _resolved(path: str) -> str:
    """The path without its steps . and .., which would lead around a robots.txt."""
    steps: list[str] = []
    for step in path.split("/")[1:]:
        if step == "..":
            del steps[-1:]
        elif step != ".":
            steps.append(step)
    return "/" + "/".join(steps) + ("/" if steps and path.endswith(("/.", "/..")) else "")


def below(host: str, domains: Collection[str]) -> bool:
    """True if the host, or a domain that it lies below, is among `domains`."""
    while host not in domains:
        host = host.partition(".")[2]
        if not host:
            return False
    return True

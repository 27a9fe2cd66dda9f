"""Web addresses, written in one way, so that what is the same can be told (RFC 3986, section 6.2.2)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import quote, urlsplit

LONGEST = 2048  # characters of an address
PORTS = {"http": 80, "https": 443}
_UNRESERVED = re.compile("%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")  # RFC 3986: need no escape
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")
_KEPT = "%/:=&?~+!$,;'@()*"  # of a path or query: reserved, or escaped already


class Address(NamedTuple):
    """Parts of a normal address; `port` is None where it is the scheme's own."""

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

    @property
    def url(self) -> str:
        return self.origin + self.target

    @property
    def key(self) -> int:
        """64 bits that are the same for http and https, with www. and without, with a slash at the end and without."""
        same = f"{self.host.removeprefix('www.')}:{self.port or ''}{self.path.rstrip('/')}?{self.query}"
        return int.from_bytes(hashlib.blake2b(same.encode(), digest_size=8).digest(), "little")


def normal(url: str) -> Address | None:
    """The address without user, fragment and its scheme's own port, in lower case where case says nothing, escaped
    where it must be; None for one that is no http or https address."""
    import idna

    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return None
    if parts.scheme not in PORTS or len(url) > LONGEST:
        return None
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode()
        except idna.IDNAError:
            return None
    elif ":" in host:
        host = f"[{host}]"
    if not _HOST.fullmatch(host):
        return None
    path, query = _escaped(_resolved(_UNRESERVED.sub(lambda m: chr(int(m[1], 16)), parts.path))), _escaped(parts.query)
    found = Address(parts.scheme, host, None if port == PORTS[parts.scheme] else port, path, query)
    return found if len(found.url) <= LONGEST else None


def _escaped(part: str) -> str:
    part = re.sub("%(?![0-9A-Fa-f]{2})", "%25", part)
    return re.sub("%..", lambda found: found[0].upper(), quote(part.encode(errors="surrogatepass"), safe=_KEPT))


def _resolved(path: str) -> str:
    """Without the steps . and .., which would lead around a robots.txt."""
    steps: list[str] = []
    for step in path.split("/")[1:]:
        if step == "..":
            del steps[-1:]
        elif step != ".":
            steps.append(step)
    return "/" + "/".join(steps) + ("/" if steps and path.endswith(("/.", "/..")) else "")


def below(host: str, hosts: Collection[str]) -> bool:
    """Whether the host, or one that it lies below, is among `hosts`."""
    while host not in hosts:
        host = host.partition(".")[2]
        if not host:
            return False
    return True

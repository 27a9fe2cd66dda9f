"""What a robots.txt asks of us (RFC 9309), read by Protego."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from conf.errors import UserError

MAX_BYTES = 512 << 10  # of a robots.txt are read; RFC 9309 asks for 500 KiB
MAX_DELAY = 300.0  # seconds; a host that asks for more is left alone
FORBIDDEN = "forbidden by robots.txt"
UNREACHABLE = "robots.txt cannot be had"  # then nothing is allowed (RFC 9309, 2.3.1.4)
TOO_SLOW = "a Crawl-delay too long to wait for"


@dataclass(frozen=True)
class Rules:
    """Of one origin, for one agent: `delay` in seconds, None where none is asked for; `until` is a monotonic time."""

    parsed: Any
    agent: str
    delay: float | None
    all_forbidden: str | None
    until: float

    def refusal(self, url: str) -> str | None:
        """Why `url` may not be asked for, or None."""
        if self.all_forbidden:
            return self.all_forbidden
        return None if self.parsed is None or self.parsed.can_fetch(url, self.agent) else FORBIDDEN


def token(agent: str) -> str:
    """The name in an agent, which robots.txt calls it by: letters, - and _, at its beginning.

    Raises:
        UserError: it begins with none.
    """
    found = re.fullmatch(r"([A-Za-z_-]+)(?![A-Za-z_-])[ -~]*", agent)
    if not found:
        raise UserError(f"fetch.agent={agent}: begin with a name of letters, as in Name/1.0 (+https://where.to/ask)")
    return found[1]


def rules(status: int | None, body: bytes, agent: str, until: float) -> Rules:
    """Of what came for robots.txt; status None where nothing came. 4xx but 429 allows everything."""
    from protego import Protego

    name = token(agent)
    if status is not None and 400 <= status < 500 and status != 429:
        return Rules(None, name, None, None, until)
    if status != 200:
        return Rules(None, name, None, UNREACHABLE, until)
    parsed = Protego.parse(body[:MAX_BYTES].decode("utf-8-sig", "replace"))
    delay, rate = parsed.crawl_delay(name), parsed.request_rate(name)
    if rate is not None:
        delay = max(delay or 0.0, rate.seconds / max(1, rate.requests))
    if delay is not None and not delay <= MAX_DELAY:
        return Rules(None, name, None, TOO_SLOW, until)
    return Rules(parsed, name, delay, None, until)

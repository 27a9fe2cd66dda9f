"""The rules of a robots.txt (RFC 9309), read by Protego."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from conf.errors import UserError

MAX_BYTES = 512 << 10  # of a robots.txt are read; RFC 9309 asks for 500 KiB
MAX_DELAY = 300.0  # seconds; pages of a host that asks for more are not fetched
FORBIDDEN = "forbidden by robots.txt"
UNREACHABLE = "robots.txt cannot be had"  # then nothing is allowed (RFC 9309, 2.3.1.4)
TOO_SLOW = "a Crawl-delay too long to wait for"


@dataclass(frozen=True)
class Rules:
    """Rules of one origin for one agent: `delay` in seconds, None if none is asked for; `until` is a monotonic time.

    `all_forbidden` is the reason why no page may be fetched, or None; `parsed` is Protego's, None if all is allowed.
    """

    agent: str
    until: float
    all_forbidden: str | None = None
    parsed: Any = None
    delay: float | None = None

    def refusal(self, url: str) -> str | None:
        """The reason why `url` may not be fetched, or None."""
        if self.all_forbidden or self.parsed is None:
            return self.all_forbidden
        return None if self.parsed.can_fetch(url, self.agent) else FORBIDDEN

    def pause(self, shortest: float) -> float:
        """Seconds between two requests."""
        return max(shortest, self.delay or 0.0)


def token(agent: str) -> str:
    """The name in an agent, by which robots.txt calls it: letters, - and _, at its start.

    Raises:
        UserError: the agent does not start with one.
    """
    name = re.fullmatch(r"([A-Za-z_-]+)(?![A-Za-z_-])[ -~]*", agent)
    if not name:
        raise UserError(f"fetch.agent={agent}: begin with a name of letters, as in Name/1.0 (+https://where.to/ask)")
    return name[1]


def rules(status: int | None, body: bytes, agent: str, until: float) -> Rules:
    """The rules of an answer to a request for robots.txt; status None = no answer. 4xx but 429 allows everything."""
    from protego import Protego

    name = token(agent)
    if status is not None and 400 <= status < 500 and status != 429:
        return Rules(name, until)
    if status != 200:
        return Rules(name, until, UNREACHABLE)
    parsed = Protego.parse(body[:MAX_BYTES].decode("utf-8-sig", "replace"))
    delay, rate = parsed.crawl_delay(name), parsed.request_rate(name)
    if rate is not None:
        delay = max(delay or 0.0, rate.seconds / max(1, rate.requests))
    if delay is not None and not delay <= MAX_DELAY:
        return Rules(name, until, TOO_SLOW)
    return Rules(name, until, None, parsed, delay)

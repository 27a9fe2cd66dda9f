"""One HTTP request: to public addresses only, within a time and a size, without retries."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Any, NamedTuple

from data_pipeline.prepare.web.urls import PORTS, Url

_CHUNK = 1 << 16  # bytes
_TRIED = 3  # IP addresses of a host, at most
NO_HOST, NOT_PUBLIC = "no such host", "an address that is not public"
LATE, BROKEN, NO_TRUST = "no whole answer within fetch.timeout_s", "the connection failed", "a certificate that fails"
NO_HTTP = "an answer that is not HTTP"


class Unanswered(Exception):
    """A request without a whole answer. The message is the reason; `retry`: another try may succeed."""

    def __init__(self, reason: str, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


class Answer(NamedTuple):
    """`body` is as it came, without the transfer's coding, and empty if it was not wanted."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    ip: str

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")


class HttpClient:
    """Requests under the name `agent`. Call `cut_late` now and then: a server that dribbles bytes never times out."""

    def __init__(self, agent: str, timeout_s: float, private: bool) -> None:
        self.agent = agent
        self.timeout_s = timeout_s
        self.private = private
        self.trust = ssl.create_default_context()
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}  # of the connections that are open

    def get(self, url: Url, limit: int, wanted: Callable[[Answer], bool]) -> Answer:
        """GET; up to `limit` + 1 bytes of a body that is wanted are read.

        Raises:
            Unanswered: no whole answer.
        """
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, ReadTimeoutError

        connection, late = None, False
        ips = self._ips(url)
        deadline = time.monotonic() + self.timeout_s
        try:
            connection = self._connect(url, ips)
            sock = connection.sock  # which an answer takes from the connection
            with self._lock:
                self._deadlines[sock] = deadline
            try:
                answer = self._exchange(connection, url, limit, wanted)
            finally:
                with self._lock:
                    late = self._deadlines.pop(sock, None) is None
        except (ConnectTimeoutError, ReadTimeoutError, TimeoutError):
            raise Unanswered(LATE, True) from None
        except ssl.SSLCertVerificationError:
            raise Unanswered(NO_TRUST, False) from None
        except (HTTPError, HTTPException, OSError, ValueError) as e:
            if late:
                raise Unanswered(LATE, True) from None
            no_http = isinstance(e, HTTPException | ValueError) and not isinstance(e, OSError)
            raise Unanswered(NO_HTTP if no_http else BROKEN, not no_http) from None
        finally:
            if connection is not None:
                connection.close()
        if late:  # which looks like the end of an answer that declares no length
            raise Unanswered(LATE, True)
        return answer

    def _exchange(self, connection: Any, url: Url, limit: int, wanted: Callable[[Answer], bool]) -> Answer:
        headers = {
            "Host": url.origin.partition("//")[2],
            "User-Agent": self.agent,
            "Accept": "text/html,*/*;q=0.1",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", url.target, headers=headers, preload_content=False, decode_content=False)
        response = connection.getresponse()
        answer = Answer(response.status, response.reason or "", list(response.headers.items()), b"", connection.host)
        body = bytearray()
        if wanted(answer):
            while len(body) <= limit and (chunk := response.read(_CHUNK)):
                body += chunk
        return answer._replace(body=bytes(body[: limit + 1]))

    def cut_late(self, now: float | None = None) -> None:
        """End the requests whose deadline has passed by `now` on the monotonic clock (None = the present)."""
        now = time.monotonic() if now is None else now
        with self._lock:
            for sock in [sock for sock, deadline in self._deadlines.items() if deadline <= now]:
                del self._deadlines[sock]
                with suppress(OSError):  # and not SSLSocket's own, which the reader would trip over
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _ips(self, url: Url) -> list[str]:
        try:
            infos = socket.getaddrinfo(url.host.strip("[]"), None, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as e:
            raise Unanswered(NO_HOST, getattr(e, "errno", None) == socket.EAI_AGAIN) from None
        ips = list(dict.fromkeys(str(info[4][0]) for info in infos))
        if not self.private and not all(map(is_public, ips)):
            raise Unanswered(NOT_PUBLIC, False)
        return ips[:_TRIED]

    def _connect(self, url: Url, ips: list[str]) -> Any:
        """A connection to one of the very IP addresses that were checked: a name may lead elsewhere the next time."""
        from urllib3.connection import HTTPConnection, HTTPSConnection

        name, port = url.host.strip("[]"), url.port or PORTS[url.scheme]
        for ip in ips:
            connection: Any = (
                HTTPConnection(ip, port, timeout=self.timeout_s)
                if url.scheme == "http"
                else HTTPSConnection(ip, port, timeout=self.timeout_s, ssl_context=self.trust, server_hostname=name)
            )
            try:
                connection.connect()
                return connection
            except Exception:
                connection.close()
                if ip == ips[-1]:
                    raise
        raise OSError("no address")


CARRIERS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "::/96", "fec0::/10")))
"""IPv6 addresses that stand for an IPv4 one, or for one of a site."""


def is_public(ip: str) -> bool:
    parsed = ipaddress.ip_address(ip.partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    if any(parsed in network for network in CARRIERS):
        return False
    return parsed.is_global and not parsed.is_multicast

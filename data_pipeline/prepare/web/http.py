"""One HTTP request, as a guest: to public addresses only, within a time and a size, never tried again here."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NamedTuple

from data_pipeline.prepare.web.urls import PORTS, Address

_CHUNK = 1 << 16  # bytes
_TRIED = 3  # of the addresses that a host has
NO_HOST, NOT_PUBLIC = "no such host", "an address that is not public"
LATE, BROKEN, NO_TRUST = "no whole answer within fetch.timeout_s", "the connection failed", "a certificate that fails"
NO_HTTP = "an answer that is not HTTP"


class Unanswered(Exception):
    """The message is the reason; `again` says whether it may go better later."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class Answer(NamedTuple):
    """`body` is as it came, without the transfer's coding, and empty where it was not wanted."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    ip: str

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")


@dataclass
class _Asked:
    deadline: float
    sock: socket.socket
    cut: bool = False


class HttpClient:
    """Asks under the name `agent`. `cut_late` must be called now and then: a server that dribbles never times out."""

    def __init__(self, agent: str, timeout_s: float, private: bool) -> None:
        self.agent, self.timeout_s, self.private = agent, timeout_s, private
        self.trust = ssl.create_default_context()
        self._lock = threading.Lock()
        self._asking: dict[int, _Asked] = {}

    def ask(self, address: Address, most: int, wanted: Callable[[Answer], bool]) -> Answer:
        """GET; of a body that is wanted at most `most` + 1 bytes are read.

        Raises:
            Unanswered: no whole answer.
        """
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, ReadTimeoutError

        asked, connection = None, None
        ips = self._ips(address)
        deadline = time.monotonic() + self.timeout_s
        try:
            connection = self._connected(address, ips)
            asked = _Asked(deadline, connection.sock)
            with self._lock:
                self._asking[id(asked)] = asked
            answer = self._answer(connection, address, most, wanted)
        except (ConnectTimeoutError, ReadTimeoutError, TimeoutError):
            raise Unanswered(LATE, True) from None
        except ssl.SSLCertVerificationError:
            raise Unanswered(NO_TRUST, False) from None
        except (HTTPError, HTTPException, OSError, ValueError) as e:
            if asked and asked.cut:
                raise Unanswered(LATE, True) from None
            no_http = isinstance(e, HTTPException | ValueError) and not isinstance(e, OSError)
            raise Unanswered(NO_HTTP if no_http else BROKEN, not no_http) from None
        finally:
            with self._lock:
                self._asking.pop(id(asked), None)
            if connection is not None:
                connection.close()
        if asked.cut:  # which looks like the end of an answer that declares no length
            raise Unanswered(LATE, True)
        return answer

    def _answer(self, connection: Any, address: Address, most: int, wanted: Callable[[Answer], bool]) -> Answer:
        headers = {
            "Host": address.origin.partition("//")[2],
            "User-Agent": self.agent,
            "Accept": "text/html,*/*;q=0.1",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", address.target, headers=headers, preload_content=False, decode_content=False)
        response = connection.getresponse()
        answer = Answer(response.status, response.reason or "", list(response.headers.items()), b"", connection.host)
        body = bytearray()
        if wanted(answer):
            while len(body) <= most and (chunk := response.read(_CHUNK)):
                body += chunk
        return answer._replace(body=bytes(body[: most + 1]))

    def cut_late(self, at: float | None = None) -> None:
        """End what should have been answered by now, or by `at` on the monotonic clock."""
        at = time.monotonic() if at is None else at
        with self._lock:
            for asked in self._asking.values():
                if asked.deadline <= at:
                    asked.cut = True
                    with suppress(OSError):  # and not SSLSocket's own, which the reader would trip over
                        socket.socket.shutdown(asked.sock, socket.SHUT_RDWR)

    def _ips(self, address: Address) -> list[str]:
        try:
            found = socket.getaddrinfo(address.host.strip("[]"), None, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as e:
            raise Unanswered(NO_HOST, getattr(e, "errno", None) == socket.EAI_AGAIN) from None
        ips = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not self.private and not all(map(_is_public, ips)):
            raise Unanswered(NOT_PUBLIC, False)
        return ips[:_TRIED]

    def _connected(self, address: Address, ips: list[str]) -> Any:
        """To the very IP addresses that were looked at: a name may lead elsewhere the next time."""
        from urllib3.connection import HTTPConnection, HTTPSConnection

        host, port = address.host.strip("[]"), address.port or PORTS[address.scheme]
        for ip in ips:
            connection: Any = (
                HTTPConnection(ip, port, timeout=self.timeout_s)
                if address.scheme == "http"
                else HTTPSConnection(ip, port, timeout=self.timeout_s, ssl_context=self.trust, server_hostname=host)
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


def _is_public(ip: str) -> bool:
    found = ipaddress.ip_address(ip.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    if any(found in network for network in CARRIERS):
        return False
    return found.is_global and not found.is_multicast

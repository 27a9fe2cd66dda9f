"""A polite crawl: one request at a time to a host, a pause after each, and only what the host's robots.txt allows; the
same for the hosts that redirects lead to. Each link gets a verdict, and each page is fetched once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin

from data_pipeline.corpus.document import Document
from data_pipeline.corpus.report import Report, Tally
from data_pipeline.prepare.recipe_config import FetchPagesConfig
from data_pipeline.prepare.web import robots
from data_pipeline.prepare.web.host_queue import Host, HostQueue, Request
from data_pipeline.prepare.web.http import NO_HOST, NOT_PUBLIC, Answer, HttpClient, Unanswered
from data_pipeline.prepare.web.links import key_of
from data_pipeline.prepare.web.page_archive import PageArchive
from data_pipeline.prepare.web.robots import Rules
from data_pipeline.prepare.web.urls import Url, normalize

FETCHED = "fetched"
REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
LONGEST_WAIT = 600.0  # seconds that a Retry-After may ask for
SILENT = 5  # links of one host in a row without an answer: the others are not tried
RULES = 1024  # origins whose rules are kept
DAY = 86_400.0  # seconds that a robots.txt counts (RFC 9309, section 2.4)
_PAGES = ("text/html", "application/xhtml+xml")


class Crawl:
    """Threads that each take the next host that is ready and send it one request."""

    def __init__(self, cfg: FetchPagesConfig, archive: PageArchive) -> None:
        self.cfg = cfg
        self.archive = archive
        self.report = Report()
        self.client = HttpClient(cfg.agent, cfg.timeout_s, cfg.private)
        self.queue = HostQueue(cfg.connections)
        self.left = 0
        self._limit = int(cfg.page_mib * (1 << 20))
        self._archived: set[int] = set()  # keys of the pages in the archive
        self._rules: OrderedDict[str, Rules] = OrderedDict()
        self._error: BaseException | None = None

    def add(self, link: str, host: str) -> None:
        self.queue.add(link, host)
        self.left += 1

    def count(self, verdict: dict[str, Any]) -> None:
        """Count a link's verdict, of this run or an earlier one."""
        tally = Tally(documents=1, bytes=verdict.get("bytes", 0))
        self.report.taken.add(tally)
        if verdict["outcome"] == FETCHED:
            self._archived.add(key_of(verdict["url"]))
            self.report.given.add(tally)
        else:
            self.report.drop(verdict["outcome"], Document("", verdict["link"], metadata={"url": verdict["url"]}))

    def run(self, name: str) -> None:
        """Work until every link has its verdict. Whatever ends it early leaves the archive as it should be."""
        from tqdm import tqdm

        self.queue.start()
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.cfg.connections)]
        every = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(total=self.left, unit="link", desc=name, mininterval=every) as bar:
            try:
                for thread in threads:
                    thread.start()
                while not self.queue.stopped.wait(0.1):
                    self.client.cut_late()
                    bar.update(bar.total - self.left - bar.n)
            finally:
                self.queue.stop()
                self.client.cut_late(float("inf"))
                end = time.monotonic() + self.cfg.timeout_s
                for thread in threads:
                    thread.join(max(0.0, end - time.monotonic()))
                bar.update(bar.total - self.left - bar.n)
        if self._error:
            raise self._error

    def _work(self) -> None:
        try:
            for name in iter(self.queue.next, None):
                self._send(self.queue.hosts[name])
                self.queue.put_back(name)
        except BaseException as e:
            self._error = self._error or e
            self.queue.stop()

    def _send(self, host: Host) -> None:
        """Send one request to the host, for its next link or, before that, its robots.txt."""
        request = self.queue.request(host)
        assert request is not None
        rules = self._rules_of(request.url.origin)
        if rules is None:
            self._get_robots(host, request.url)
        elif reason := rules.refusal(str(request.url)):
            self._finish(host, request, reason)
        elif request.url.key in self._archived:
            self._finish(host, request, "leads to a page that is here already")
        else:
            try:
                answer = self.client.get(request.url, self._limit, _is_page)
                wait = self._handle(host, request, answer)
            except Unanswered as e:
                if self.queue.stopped.is_set():
                    return
                wait = self._retry(host, request, str(e)) if e.retry else self._finish(host, request, str(e))
                host.silent += request not in host.requests
                if host.silent >= SILENT:
                    while (rest := self.queue.request(host)) is not None:
                        self._finish(host, rest, "the host no longer answers")
            self.queue.pause(host, max(rules.pause(self.cfg.per_host_s), wait))

    def _handle(self, host: Host, request: Request, answer: Answer) -> float:
        """Act on an answer; returns the seconds for which the host must be left alone because of it."""
        host.silent = 0
        if answer.status in MOVED:
            return self._redirect(host, request, answer)
        if _is_busy(answer):
            return self._retry(host, request, "the server fails or refuses for now", answer)
        if answer.status != 200:
            outcome = "no such page" if answer.status in (404, 410) else "refused by the server"
        elif not _is_page(answer):
            outcome = "not a page of text"
        else:
            outcome = "a page larger than fetch.page_mib" if len(answer.body) > self._limit else FETCHED
        return self._finish(host, request, outcome, answer)

    def _redirect(self, host: Host, request: Request, answer: Answer) -> float:
        url = _target(request.url, answer)
        if url is None:
            return self._finish(host, request, "a redirect to no web address", answer)
        if request.hops == REDIRECTS:
            return self._finish(host, request, "more than 5 redirects", answer)
        self.queue.redirect(host, request, url)
        return 0.0

    def _retry(self, host: Host, request: Request, reason: str, answer: Answer | None = None) -> float:
        """Leave the request for another try; returns the seconds until then, 0 if there is none."""
        if request.tries >= self.cfg.retries:
            return self._finish(host, request, reason)
        request.tries += 1
        wait = self._backoff(request.tries, answer)
        if wait > LONGEST_WAIT:
            return self._finish(host, request, "a Retry-After too long to wait for")
        return wait

    def _backoff(self, tries: int, answer: Answer | None) -> float:
        """Seconds until the next try: the answer's Retry-After, or twice as many as before."""
        wait = _retry_after(answer) if answer else None
        return self.cfg.per_host_s * 2**tries if wait is None else wait

    def _finish(self, host: Host, request: Request, outcome: str, answer: Answer | None = None) -> float:
        """Give a link its verdict; returns 0, for a host that need not be left alone because of it."""
        verdict: dict[str, Any] = {"link": request.link, "outcome": outcome, "url": str(request.url)}
        if answer is not None:
            verdict |= {"status": answer.status, "bytes": len(answer.body) if outcome == FETCHED else 0}
        self.archive.add(verdict, answer if outcome == FETCHED else None)
        with self.queue.lock:
            self.count(verdict)
            host.requests.remove(request)
            self.left -= 1
        return 0.0

    def _rules_of(self, origin: str) -> Rules | None:
        with self.queue.lock:
            rules = self._rules.get(origin)
            if rules is None or rules.until <= time.monotonic():
                return None
            self._rules.move_to_end(origin)
            return rules

    def _get_robots(self, host: Host, page: Url) -> None:
        """Try once to get the rules of a page's origin; if the last try fails, they forbid everything."""
        url: Url | None = page._replace(path="/robots.txt", query="")
        answer, reason, retry = None, robots.UNREACHABLE, False
        try:
            for hop in range(REDIRECTS + 1):
                if url is None:
                    break
                if hop:
                    self.queue.wait_for(url.host, self.cfg.per_host_s)
                answer = self.client.get(url, robots.MAX_BYTES, lambda answer: answer.status == 200)
                retry = _is_busy(answer)
                if answer.status not in MOVED:
                    break
                url = _target(url, answer)
        except Unanswered as e:
            answer, reason, retry = None, str(e), e.retry
        if self.queue.stopped.is_set():
            return
        if retry and host.tries < self.cfg.retries:
            host.tries += 1
            self.queue.pause(host, min(LONGEST_WAIT, self._backoff(host.tries, answer)))
            return
        host.tries = 0
        status, body = (answer.status, answer.body) if answer else (None, b"")
        rules = robots.rules(status, body, self.cfg.agent, time.monotonic() + DAY)
        if reason in (NO_HOST, NOT_PUBLIC):
            rules = replace(rules, all_forbidden=reason)
        verdict = {"robots": page.origin, "status": status, "forbids": rules.all_forbidden, "delay": rules.delay}
        self.archive.add(verdict)
        with self.queue.lock:
            self._rules[page.origin] = rules
            if len(self._rules) > RULES:
                self._rules.popitem(last=False)
        self.queue.pause(host, rules.pause(self.cfg.per_host_s))


def _is_page(answer: Answer) -> bool:
    kind = answer.header("content-type").partition(";")[0].strip().lower()
    return answer.status == 200 and kind in ("", *_PAGES)


def _is_busy(answer: Answer) -> bool:
    return answer.status == 429 or answer.status >= 500


def _target(url: Url, answer: Answer) -> Url | None:
    """The URL that a redirect leads to; None for no web address."""
    location = answer.header("location")
    try:
        return normalize(urljoin(str(url), location)) if location else None
    except ValueError:
        return None


def _retry_after(answer: Answer) -> float | None:
    """Seconds (RFC 9110, section 10.2.3), or None if the header says nothing that can be read."""
    value = answer.header("retry-after").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None

"""Pages asked for as a guest asks: of a host one thing at a time, with a pause after each, and only what its robots.txt
allows; so with the hosts that redirects lead to. Each link gets a verdict, and each page is asked for once.
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

from data_pipeline.prepare.recipe_config import FetchPagesConfig
from data_pipeline.prepare.step import SAMPLES, Passage, Tally
from data_pipeline.prepare.web import robots
from data_pipeline.prepare.web.host_queue import Host, HostQueue, Job
from data_pipeline.prepare.web.http import NO_HOST, NOT_PUBLIC, Answer, HttpClient, Unanswered
from data_pipeline.prepare.web.links import key_of
from data_pipeline.prepare.web.page_archive import PageArchive
from data_pipeline.prepare.web.robots import Rules
from data_pipeline.prepare.web.urls import Address, normal

FETCHED = "fetched"
REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
LONGEST_WAIT = 600.0  # seconds that a Retry-After may ask for
SILENT = 5  # links of one host in a row without an answer: the others are not tried
RULES = 1024  # origins whose rules are kept
DAY = 86_400.0  # seconds that a robots.txt counts (RFC 9309, section 2.4)
_PAGES = ("text/html", "application/xhtml+xml")


class Crawl:
    """Threads that each take the host whose turn it is and ask it one thing."""

    def __init__(self, cfg: FetchPagesConfig, archive: PageArchive) -> None:
        self.cfg, self.archive, self.passage = cfg, archive, Passage()
        self.guest = HttpClient(cfg.agent, cfg.timeout_s, cfg.private)
        self.turns = HostQueue(cfg.connections)
        self.left = 0
        self._here: set[int] = set()  # keys of the pages in the archive
        self._rules: OrderedDict[str, Rules] = OrderedDict()
        self._error: BaseException | None = None

    def add(self, link: str, host: str) -> None:
        self.turns.add(link, host)
        self.left += 1

    def count(self, verdict: dict[str, Any]) -> None:
        """A link's verdict, this run's or an earlier one's."""
        outcome, size = verdict["outcome"], verdict.get("bytes", 0)
        tallies = [self.passage.taken]
        if outcome == FETCHED:
            self._here.add(key_of(verdict["url"]))
            tallies.append(self.passage.given)
        else:
            tallies.append(self.passage.dropped.setdefault(outcome, Tally()))
            samples = self.passage.samples.setdefault(outcome, [])
            if len(samples) < SAMPLES:
                samples.append({"id": verdict["link"], "url": verdict["url"], "text": ""})
        for tally in tallies:
            tally.documents += 1
            tally.bytes += size

    def run(self, name: str) -> None:
        """Until every link has its verdict. Whatever ends it early leaves the archive as it should be."""
        from tqdm import tqdm

        self.turns.begin()
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.cfg.connections)]
        every = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(total=self.left, unit="link", desc=name, mininterval=every) as bar:
            try:
                for thread in threads:
                    thread.start()
                while not self.turns.stopped.wait(0.1):
                    self.guest.cut_late()
                    bar.update(bar.total - self.left - bar.n)
            finally:
                self.turns.stop()
                self.guest.cut_late(float("inf"))
                end = time.monotonic() + self.cfg.timeout_s
                for thread in threads:
                    thread.join(max(0.0, end - time.monotonic()))
                bar.update(bar.total - self.left - bar.n)
        if self._error:
            raise self._error

    def _work(self) -> None:
        try:
            for name in iter(self.turns.next, None):
                self._ask(self.turns.hosts[name])
                self.turns.put_back(name)
        except BaseException as e:
            self._error = self._error or e
            self.turns.stop()

    def _ask(self, host: Host) -> None:
        """One request to the host, for its next link or, before that, its robots.txt."""
        job = self.turns.job(host)
        assert job is not None
        rules = self._rules_of(job.at.origin)
        if rules is None:
            self._ask_robots(host, job.at)
        elif reason := rules.refusal(job.at.url):
            self._end(host, job, reason)
        elif job.at.key in self._here:
            self._end(host, job, "leads to a page that is here already")
        else:
            pause = max(self.cfg.per_host_s, rules.delay or 0.0)
            try:
                answer = self.guest.ask(job.at, int(self.cfg.page_mib * (1 << 20)), _is_page)
                wait = self._take(host, job, answer)
            except Unanswered as e:
                if self.turns.stopped.is_set():
                    return
                wait = self._again(host, job, str(e), e.again, None)
                host.silent += job not in host.jobs
                if host.silent >= SILENT:
                    self._give_up(host)
            self.turns.pause(host, max(pause, wait))

    def _take(self, host: Host, job: Job, answer: Answer) -> float:
        """What to do with an answer; how long the host must be left alone because of it, in seconds."""
        host.silent = 0
        if answer.status in MOVED:
            self._redirect(host, job, answer)
        elif answer.status == 429 or answer.status >= 500:
            return self._again(host, job, "the server fails or refuses for now", True, _retry_after(answer))
        elif answer.status != 200:
            self._end(host, job, "no such page" if answer.status in (404, 410) else "refused by the server", answer)
        elif not _is_page(answer):
            self._end(host, job, "not a page of text", answer)
        elif len(answer.body) > self.cfg.page_mib * (1 << 20):
            self._end(host, job, "a page larger than fetch.page_mib", answer)
        else:
            self._end(host, job, FETCHED, answer)
        return 0.0

    def _redirect(self, host: Host, job: Job, answer: Answer) -> None:
        to = _target(job.at, answer)
        if to is None:
            self._end(host, job, "a redirect to no web address", answer)
        elif job.hops == REDIRECTS:
            self._end(host, job, "more than 5 redirects", answer)
        else:
            self.turns.move(host, job, to)

    def _again(self, host: Host, job: Job, reason: str, again: bool, wait: float | None) -> float:
        if not again or job.tries >= self.cfg.retries:
            self._end(host, job, reason)
            return 0.0
        job.tries += 1
        wait = self.cfg.per_host_s * 2**job.tries if wait is None else wait
        if wait > LONGEST_WAIT:
            self._end(host, job, "a Retry-After too long to wait for")
            return 0.0
        return wait

    def _end(self, host: Host, job: Job, outcome: str, answer: Answer | None = None) -> None:
        verdict: dict[str, Any] = {"link": job.link, "outcome": outcome, "url": job.at.url}
        if answer is not None:
            verdict |= {"status": answer.status, "bytes": len(answer.body) if outcome == FETCHED else 0}
        self.archive.add(verdict, answer if outcome == FETCHED else None)
        with self.turns.lock:
            self.count(verdict)
            host.jobs.remove(job)
            self.left -= 1

    def _give_up(self, host: Host) -> None:
        while (job := self.turns.job(host)) is not None:
            self._end(host, job, "the host no longer answers")

    def _rules_of(self, origin: str) -> Rules | None:
        with self.turns.lock:
            found = self._rules.get(origin)
            if found is None or found.until <= time.monotonic():
                return None
            self._rules.move_to_end(origin)
            return found

    def _ask_robots(self, host: Host, at: Address) -> None:
        """One try to have the rules of an origin; where it fails for good, they forbid everything."""
        url: Address | None = at._replace(path="/robots.txt", query="")
        answer, why, again = None, robots.UNREACHABLE, False
        for hop in range(REDIRECTS + 1):
            if url is None:
                break
            if hop:
                self.turns.wait_for(url.host, self.cfg.per_host_s)
            try:
                answer = self.guest.ask(url, robots.MAX_BYTES, lambda answer: answer.status == 200)
            except Unanswered as e:
                answer, why, again = None, str(e), e.again
                break
            again = answer.status == 429 or answer.status >= 500
            if answer.status not in MOVED:
                break
            url = _target(url, answer)
        if self.turns.stopped.is_set():
            return
        now = time.monotonic()
        if again and host.tries < self.cfg.retries:
            host.tries += 1
            wait = _retry_after(answer) if answer else None
            wait = self.cfg.per_host_s * 2**host.tries if wait is None else wait
            self.turns.pause(host, min(LONGEST_WAIT, wait))
            return
        host.tries = 0
        status, body = (answer.status, answer.body) if answer else (None, b"")
        rules = robots.rules(status, body, self.cfg.agent, now + DAY)
        if why in (NO_HOST, NOT_PUBLIC):
            rules = replace(rules, all_forbidden=why)
        self.archive.add({"robots": at.origin, "status": status, "forbids": rules.all_forbidden, "delay": rules.delay})
        with self.turns.lock:
            self._rules[at.origin] = rules
            if len(self._rules) > RULES:
                self._rules.popitem(last=False)
        self.turns.pause(host, max(self.cfg.per_host_s, rules.delay or 0.0))


def _is_page(answer: Answer) -> bool:
    kind = answer.header("content-type").partition(";")[0].strip().lower()
    return answer.status == 200 and kind in ("", *_PAGES)


def _target(at: Address, answer: Answer) -> Address | None:
    """Where a redirect leads; None = to no web address."""
    location = answer.header("location")
    try:
        return normal(urljoin(at.url, location)) if location else None
    except ValueError:
        return None


def _retry_after(answer: Answer) -> float | None:
    """Seconds (RFC 9110, section 10.2.3), or None where it says nothing that can be read."""
    said = answer.header("retry-after").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None

"""The fetcher against real servers on loopback: what it asks, how often, how fast, and what it keeps."""

from __future__ import annotations

import gzip
import itertools
import os
import random
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from fastwarc.warc import ArchiveIterator, WarcRecordType

from conf.errors import UserError
from data_pipeline.corpus.report import Report
from data_pipeline.prepare.recipe_config import FetchPagesConfig
from data_pipeline.prepare.web import crawl, host_queue, http, robots
from data_pipeline.prepare.web.fetch import fetch, task_of
from data_pipeline.prepare.web.http import Answer
from data_pipeline.prepare.web.links import Link
from data_pipeline.prepare.web.page_archive import PageArchive
from data_pipeline.prepare.web.urls import Url
from tests.helpers.seeds import seeded
from tests.helpers.sites import HTML, Reply, Site, site

AGENT = "TestBot/1.0 (+https://example.org/bot)"


@pytest.fixture
def web() -> Iterator[Site]:
    with site() as server:
        yield server


def config(**given: Any) -> FetchPagesConfig:
    usual = {"agent": AGENT, "per_host_s": 0.01, "timeout_s": 1.0, "connections": 4, "private": True, "page_mib": 0.5}
    return FetchPagesConfig(**{**usual, **given})


def listed(path: Path, *urls: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = b"".join(orjson.dumps(asdict(Link(url, 3, "2017-01-01T00:00:00Z"))) + b"\n" for url in urls)
    path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    return path


def fetched(folder: Path, *urls: str, task: int = 0, tasks: int = 1, **given: Any) -> Report:
    return fetch(listed(folder / "links.jsonl.zst", *urls), folder / "out", task, tasks, config(**given))


def outcomes(passage: Report) -> dict[str, int]:
    assert passage.taken.documents == passage.given.documents + sum(t.documents for t in passage.dropped.values())
    return {reason: tally.documents for reason, tally in passage.dropped.items()}


def archived(folder: Path) -> dict[str, bytes]:
    """url -> body of each response, as fastwarc reads them."""
    found = {}
    for path in sorted((folder / "out").glob("*.warc.gz")):
        with path.open("rb") as f:
            for record in ArchiveIterator(
                f, record_types=WarcRecordType.response, parse_http=True, verify_digests=True
            ):
                assert record.http_headers.status_code == 200
                assert record.headers["WARC-Target-URI"] not in found
                found[record.headers["WARC-Target-URI"]] = record.reader.read()
    return found


def test_pages_are_archived_as_they_came(web: Site, tmp_path: Path) -> None:
    """Pages are archived as they came, and each link has its outcome."""
    body = secrets.token_bytes(100_000)
    web.put("/a", body)
    packed = gzip.compress(b"<p>x</p>")
    web.put("/gzip", Reply(packed, headers=HTML | {"Content-Encoding": "gzip"}))
    web.put("/no-type", Reply(b"<p>y</p>", headers={}))
    web.put("/image", Reply(b"png", headers={"Content-Type": "image/png"}))
    web.put("/gone", 410)
    web.put("/secret", 403)
    web.put("/huge", bytes(600_000))
    web.put("/endless", Reply(fault="endless"))
    paths = ["/a", "/gzip", "/no-type", "/image", "/gone", "/missing", "/secret", "/huge", "/endless"]
    passage = fetched(tmp_path, *map(web.url, paths))
    assert outcomes(passage) == {
        "not a page of text": 1,
        "no such page": 2,
        "refused by the server": 1,
        "a page larger than fetch.page_mib": 2,
    }
    assert archived(tmp_path) == {
        web.url("/a"): body,
        web.url("/gzip"): packed,
        web.url("/no-type"): b"<p>y</p>",
    }
    assert passage.given.bytes == sum(map(len, archived(tmp_path).values()))
    assert web.agents == {AGENT} and all(web.count(path) == 1 for path in [*paths, "/robots.txt"])


def test_robots_txt_is_obeyed_and_asked_for_once(web: Site, tmp_path: Path) -> None:
    web.put(
        "/robots.txt", b"User-agent: testbot\nDisallow: /private\nAllow: /private/open\n\nUser-agent: *\nDisallow: /\n"
    )
    web.put("/private/open", b"open")
    web.put("/a", b"a")
    web.move("/there", "/x/../private/b")
    passage = fetched(tmp_path, *map(web.url, ["/private/a", "/private/open", "/a", "/there", "/%70rivate/a?"]))
    assert outcomes(passage)[robots.FORBIDDEN] >= 2
    assert set(archived(tmp_path)) == {web.url("/a"), web.url("/private/open")}
    assert web.count("/robots.txt") == 1 and not web.count("/private/a") and not web.count("/private/b")


@pytest.mark.parametrize(
    ("reply", "allowed"),
    [(404, True), (403, True), (500, False), (429, False), (Reply(fault="hang"), False), (Reply(fault="cut"), False)],
)
def test_a_failed_robots_txt_forbids_all_and_a_missing_one_none(
    web: Site, tmp_path: Path, reply: Any, allowed: bool
) -> None:
    """Without a robots.txt all pages are allowed; if it cannot be had, none is."""
    web.put("/robots.txt", reply)
    web.put("/a", b"a")
    passage = fetched(tmp_path, web.url("/a"), timeout_s=0.2, retries=1)
    assert outcomes(passage) == ({} if allowed else {robots.UNREACHABLE: 1})
    assert web.count("/robots.txt") == (1 if allowed else 2) and web.count("/a") == allowed


def test_a_robots_txt_is_followed_where_it_moved(web: Site, tmp_path: Path) -> None:
    web.move("/robots.txt", web.url("/robots2.txt", "localhost"))
    web.put("/robots2.txt", b"User-agent: *\nDisallow: /a")
    assert outcomes(fetched(tmp_path, web.url("/a"), web.url("/b"))) == {robots.FORBIDDEN: 1, "no such page": 1}


def test_a_host_gets_one_request_at_a_time_with_a_pause(web: Site, tmp_path: Path) -> None:
    """A host gets one request at a time with a pause after each; hosts are fetched from concurrently."""
    web.put("/robots.txt", b"User-agent: *\nCrawl-delay: 0.2")
    hosts = ["127.0.0.1", "localhost"]
    fetched(tmp_path, *(web.url(f"/{i}", host) for host in hosts for i in range(3)), per_host_s=0.05)
    for host in hosts:
        times = web.times(host)
        assert len(times) == 4
        assert all(b - a >= 0.2 for a, b in itertools.pairwise(times))
    assert min(web.times("localhost")) < max(web.times("127.0.0.1"))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_hosts_that_redirect_to_each_other_keep_their_pace(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many hosts that redirect to each other each keeps its pace, and no link is lost."""
    seed = seeded()
    rng = random.Random(seed)
    urls = [f"http://h{i}.example/{j}" for i in range(90) for j in range(3)]
    leads = {url: f"http://h{rng.randrange(99)}.example/to/{rng.randrange(9)}" for url in urls if rng.random() < share}
    spans_of: dict[str, list[tuple[float, float]]] = defaultdict(list)

    class HttpClient:
        def __init__(self, *_: object) -> None:
            pass

        def cut_late(self, now: float = 0) -> None:
            pass

        def get(self, url: Url, limit: int, wanted: object) -> Answer:
            start = time.monotonic()
            time.sleep(rng.random() * 0.004)
            spans_of[url.host].append((start, time.monotonic()))
            if url.path == "/robots.txt":
                return Answer(404, "", [], b"", "")
            if to := leads.get(str(url)):
                return Answer(302, "", [("Location", to)], b"", "")
            return Answer(200, "OK", [("Content-Type", "text/html")], str(url).encode(), "")

    monkeypatch.setattr(crawl, "HttpClient", HttpClient)
    monkeypatch.setattr(host_queue, "OPEN", 2)
    passage = fetched(tmp_path, *urls, connections=8, per_host_s=0.03)
    pages = {leads.get(url, url) for url in urls}
    assert archived(tmp_path) == {url: url.encode() for url in pages}, f"seed {seed}"
    assert passage.taken.documents == len(urls), f"seed {seed}"
    again = {"leads to a page that is here already": len(urls) - len(pages)}
    assert outcomes(passage) == (again if len(urls) > len(pages) else {}), f"seed {seed}"
    for spans in spans_of.values():
        assert all(b - a >= 0.03 for (_, a), (b, _) in itertools.pairwise(spans)), f"seed {seed}"
    starts = [(spans[0][0], 1) for spans in spans_of.values()]
    ends = [(spans[-1][1], -1) for spans in spans_of.values()]
    if not share:  # where a redirect opens none, hosts wait for their turn
        assert max(itertools.accumulate(step for _, step in sorted(starts + ends))) <= 16, f"seed {seed}"


def test_a_crawl_delay_beyond_reason_is_told_and_not_shortened(web: Site, tmp_path: Path) -> None:
    web.put("/robots.txt", b"User-agent: *\nCrawl-delay: 86400")
    assert outcomes(fetched(tmp_path, web.url("/a"))) == {robots.TOO_SLOW: 1}
    assert not web.count("/a")


def test_redirects_are_followed_at_each_hosts_pace(web: Site, tmp_path: Path) -> None:
    """Redirects are followed over hosts at each host's pace, and each page is fetched once."""
    web.put("/page", b"page")
    for i in range(3):
        web.move(f"/to{i}", web.url("/page", "localhost"))
    web.move("/loop", "/loop")
    for i in range(7):
        web.move(f"/step{i}", f"/step{i + 1}")
    web.move("/away", "ftp://files.example/")
    web.move("/nowhere", "")
    urls = [web.url(path) for path in ["/to0", "/to1", "/to2", "/loop", "/step0", "/step2", "/away", "/nowhere"]]
    passage = fetched(tmp_path, *urls, per_host_s=0.05)
    assert outcomes(passage) == {
        "leads to a page that is here already": 2,
        "more than 5 redirects": 2,
        "a redirect to no web address": 2,
        "no such page": 1,
    }
    assert archived(tmp_path) == {web.url("/page", "localhost"): b"page"}
    assert web.count("/page") == 1 and web.count("/loop") == 6
    for host in ("localhost", "127.0.0.1"):
        assert all(b - a >= 0.05 for a, b in itertools.pairwise(web.times(host)))


def test_transient_failures_are_retried_and_then_given_up(web: Site, tmp_path: Path) -> None:
    """A failure that may go away is retried after a wait, and given up after some tries."""
    web.put("/later", 500, 503, b"at last")
    web.put("/broken", Reply(fault="cut"), b"whole")
    web.put("/limited", Reply(status=429, headers={"Retry-After": "1"}), b"limited")
    web.put("/never", 500)
    web.put("/next-year", Reply(status=503, headers={"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}))
    paths = ["/later", "/broken", "/limited", "/never", "/next-year"]
    passage = fetched(tmp_path, *map(web.url, paths), retries=2)
    assert outcomes(passage) == {
        "the server fails or refuses for now": 1,
        "a Retry-After too long to wait for": 1,
    }
    assert {web.count(p) for p in ("/later", "/never")} == {3} and web.count("/next-year") == 1
    assert sorted(archived(tmp_path).values()) == [b"at last", b"limited", b"whole"]
    first, second = [at for at, _, path in web.asked if path == "/limited"]
    assert second - first >= 1


@pytest.mark.parametrize("fault", ["hang", "dribble", "dribbled headers", "garbage"])
def test_a_server_that_does_not_answer_costs_its_timeout(web: Site, tmp_path: Path, fault: str) -> None:
    """A server that does not answer costs its timeout and no more."""
    web.put("/bad", Reply(b"x" * 10_000, fault=fault))
    web.put("/good", b"good")
    passage = fetched(tmp_path, web.url("/bad"), web.url("/good"), timeout_s=1.5, retries=1)
    assert outcomes(passage) == {http.NO_HTTP if fault == "garbage" else http.LATE: 1}
    assert list(archived(tmp_path).values()) == [b"good"]


def test_a_host_that_stopped_answering_is_left_alone(web: Site, tmp_path: Path) -> None:
    for i in range(12):
        web.put(f"/{i}", Reply(fault="cut"))
    passage = fetched(tmp_path, *(web.url(f"/{i}") for i in range(12)), retries=0)
    assert outcomes(passage) == {http.BROKEN: crawl.SILENT, "the host no longer answers": 12 - crawl.SILENT}


def test_addresses_that_are_not_public_are_never_connected_to(web: Site, tmp_path: Path) -> None:
    port = web.port
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "0.0.0.0"]
    hosts += ["169.254.169.254", "192.168.1.1", "224.0.0.1", "[fe80::1]", "[fc00::1]"]
    passage = fetched(tmp_path, *(f"http://{host}:{port}/" for host in hosts), private=False)
    assert outcomes(passage) == {http.NOT_PUBLIC: len(hosts)}
    assert not web.asked


def test_a_redirect_to_an_address_that_is_not_public_is_refused(
    web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "is_public", lambda ip: ip == "127.0.0.1")
    web.move("/inside", web.url("/secret", "127.0.0.2"))
    web.put("/a", b"a")
    passage = fetched(tmp_path, web.url("/inside"), web.url("/a"), private=False)
    assert outcomes(passage) == {http.NOT_PUBLIC: 1} and passage.given.documents == 1


def test_a_full_disk_is_one_line_and_loses_no_page(web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        web.put(f"/{i}", b"%d" % i)
    urls = [web.url(f"/{i}") for i in range(4)]
    add, room = PageArchive.add, iter([True, True, True, False])

    def full(self: PageArchive, *what: Any) -> None:
        if not next(room):
            self.file.write(b"\x1f\x8b half of a write")
            raise OSError(28, "No space left on device")
        add(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(PageArchive, "add", full)
        with pytest.raises(UserError, match=r"pages-00000-of-00001.warc.gz: No space left on device: fix it"):
            fetched(tmp_path, *urls)
    assert fetched(tmp_path, *urls).given.documents == 4 and len(archived(tmp_path)) == 4
    assert Counter(path for _, _, path in web.asked if path != "/robots.txt").most_common(2)[1][1] == 1


def test_tls_needs_a_valid_certificate(web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS only a page with a valid certificate is archived."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program, which makes the certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(made, check=True, capture_output=True)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(cert, key)
    web.socket = served.wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
    web.put("/a", b"a")
    web.put("/slow", Reply(b"x" * 10_000, fault="dribble"))
    url = web.url("/a", "localhost").replace("http:", "https:")
    assert outcomes(fetched(tmp_path / "1", url, retries=0)) == {robots.UNREACHABLE: 1}
    trust = ssl.create_default_context(cafile=str(cert))
    monkeypatch.setattr(ssl, "create_default_context", lambda: trust)
    urls = [url, url.replace("/a", "/slow"), url.replace("localhost", "127.0.0.1")]
    passage = fetched(tmp_path / "2", *urls, retries=0, timeout_s=2.0)
    assert archived(tmp_path / "2") == {url: b"a"}
    assert outcomes(passage) == {http.LATE: 1, robots.UNREACHABLE: 1}


def test_a_name_that_no_one_has_is_told(tmp_path: Path) -> None:
    assert outcomes(fetched(tmp_path, "http://nobody.invalid/", retries=0)) in (
        {http.NO_HOST: 1},
        {robots.UNREACHABLE: 1},
    )


def test_each_domain_and_each_link_belongs_to_one_task(web: Site, tmp_path: Path) -> None:
    """All hosts of a domain belong to one task, and so does every link."""
    hosts = [f"{sub}site{i}.co.uk" for i in range(40) for sub in ("", "www.", "a.b.")]
    assert len({(host.split("site")[1], task_of(host, 16)) for host in hosts}) == 40
    assert len({task_of(host, 16) for host in hosts}) > 8
    web.put("/a", b"a")
    urls = [web.url("/a"), web.url("/a", "localhost")]
    passages = [fetched(tmp_path, *urls, task=task, tasks=3) for task in range(3)]
    assert sum(p.taken.documents for p in passages) == 2 and len(archived(tmp_path)) == 2
    with pytest.raises(UserError, match=r"holds pages-0000.-of-00003.warc.gz, but fetch.files=4"):
        fetched(tmp_path, *urls, tasks=4)


RUN = """
import sys
from pathlib import Path
from data_pipeline.prepare.web.page_archive import PageArchive
from data_pipeline.prepare.web.fetch import fetch
from data_pipeline.prepare.recipe_config import FetchPagesConfig
cfg = FetchPagesConfig(agent="TestBot", per_host_s=0.02, timeout_s=2.0, connections=4, private=True)
print(fetch(Path(sys.argv[1]), Path(sys.argv[2]), 0, 1, cfg).to_json())
"""


def test_a_killed_fetch_goes_on_and_fetches_nothing_twice(web: Site, tmp_path: Path) -> None:
    """A fetch that was stopped or killed goes on and fetches no page twice."""
    seed = seeded()
    bodies = {f"/{i}": secrets.token_bytes(3000) for i in range(40)}
    for path, body in bodies.items():
        web.put(path, body)
    urls = [web.url(path, host) for path in [*bodies, "/missing"] for host in ("127.0.0.1", "localhost")]
    links = listed(tmp_path / "links.jsonl.zst", *urls)
    command = [sys.executable, "-c", RUN, str(links), str(tmp_path / "out")]
    asked: Counter[tuple[str, str]] = Counter()
    for enough, stop in ((10, signal.SIGINT), (40, signal.SIGKILL)):
        begun = len(web.asked)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(web.asked) - begun < enough and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(stop)
        process.wait()
        path = tmp_path / "out" / "pages-00000-of-00001.warc.gz"
        with path.open("ab") as f:  # a write of which a part reached the disk
            f.write(gzip.compress(b"WARC/1.1\r\nWARC-Type: response\r\n" + os.urandom(5000))[: 40 + enough * 10])
    passage = fetch(links, tmp_path / "out", 0, 1, config())
    assert outcomes(passage) == {"no such page": 2}, f"seed {seed}"
    assert passage.given.documents == 80
    assert archived(tmp_path) == {web.url(p, h): b for p, b in bodies.items() for h in ("127.0.0.1", "localhost")}
    asked.update((host, path) for _, host, path in web.asked if path != "/robots.txt")
    in_flight = sum(count - 1 for count in asked.values())  # asked for when the kill came, and not yet on the disk
    assert in_flight <= 2 * 2, asked.most_common(6)
    before = len(web.asked)
    again = fetch(links, tmp_path / "out", 0, 1, config())
    assert again == passage and len(web.asked) == before


def test_damage_that_no_kill_explains_is_an_error(web: Site, tmp_path: Path) -> None:
    """Damage that no kill explains is an error, and nothing is cut off."""
    for i in range(2):
        web.put(f"/{i}", os.urandom(1 << 23))
    fetched(tmp_path, web.url("/0"), web.url("/1"), page_mib=9, timeout_s=20)
    path = tmp_path / "out" / "pages-00000-of-00001.warc.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4] ^= 255
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"damaged from byte \d+ on: delete it"):
        fetched(tmp_path, web.url("/0"), page_mib=0.5)
    assert path.read_bytes() == raw


def test_a_file_of_others_is_not_taken_for_an_archive(web: Site, tmp_path: Path) -> None:
    path = tmp_path / "out" / "pages-00000-of-00001.warc.gz"
    path.parent.mkdir()
    path.write_text("years of work")
    with pytest.raises(UserError, match=r"gz: no archive of pages: move it away$"):
        fetched(tmp_path, web.url("/0"))
    assert path.read_text() == "years of work"


def test_an_agent_without_a_name_is_refused(tmp_path: Path) -> None:
    for agent in ("007", "", "Bot\nX: y"):
        with pytest.raises(UserError, match=r"(?s)fetch.agent=.*begin with a name of letters"):
            fetched(tmp_path, "http://a.example/", agent=agent)

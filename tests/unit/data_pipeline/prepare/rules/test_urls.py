"""Which addresses are refused, against a set of strings and a loop."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from conf.errors import UserError
from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import UrlConfig
from data_pipeline.prepare.rules.lists import Domains
from data_pipeline.prepare.rules.urls import Urls, host_of
from tests.helpers.seeds import seeded


def reason(step: Urls, url: str | None) -> str | None:
    return step.apply([Document(text="x", id="x", metadata={} if url is None else {"url": url})])[0]


@pytest.fixture
def step(tmp_path: Path) -> Urls:
    (tmp_path / "domains").write_bytes(b"# a comment\nBad.example\n\r\n10.1.2.3\r\nxn--bcher-kva.example\n\xff\xfe\n")
    (tmp_path / "words").write_text("casino\nporn\n")
    own = ["own.example", " Also.Own.Example. "]
    return Urls(UrlConfig(domains=own, blocklists=[str(tmp_path / "domains")], words=[str(tmp_path / "words")]))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://bad.example/a", "domain"),
        ("https://www.bad.example", "domain"),
        ("https://a.b.BAD.example:8080/x?y#z", "domain"),
        ("http://user:secret@bad.example./", "domain"),
        ("http://10.1.2.3/", "domain"),
        ("http://bücher.example/", "domain"),
        ("http://own.example/", "domain"),
        ("http://x.also.own.example/", "domain"),
        ("http://notbad.example/", None),
        ("http://bad.example.org/", None),
        ("http://example/bad.example", None),
        ("http://good.example/play/Casino-royal", "hard_blacklisted"),
        ("http://porn.good.example/", "hard_blacklisted"),
        ("http://good.example/casinos", None),
        ("http://[::1]:80/", None),
        ("bad.example/a", "malformed url"),
        ("ftp://bad.example/", "malformed url"),
        ("http:///path", "malformed url"),
        ("http://a b.example/", "malformed url"),
        ("http://[::1/", "malformed url"),
        ("http://good.example:port/", "malformed url"),
        ("http://a..example/", "malformed url"),
        ("http://" + "a." * 200 + "example/", "malformed url"),
        ("", "malformed url"),
        (None, None),
    ],
)
def test_an_address_is_refused_for_its_reason(step: Urls, url: str | None, expected: str | None) -> None:
    assert reason(step, url) == expected


def test_a_host_is_what_browsers_ask_for() -> None:
    assert host_of("HTTPS://Straße.Example./x") == "strasse.example"
    assert host_of("http://\ud800.example/") is None


def test_domains_cover_what_a_set_and_a_loop_cover() -> None:
    seed = seeded()
    rng = Random(seed)

    def host() -> str:
        return ".".join(rng.choices("abc", k=rng.randrange(1, 5)))

    listed = {host() for _ in range(20)}
    domains = Domains(domain.encode() for domain in sorted(listed))
    for _ in range(1000):
        asked = host()
        expected = any(asked == domain or asked.endswith(f".{domain}") for domain in listed)
        assert domains.cover(asked) == expected, f"seed {seed}: {asked} in {sorted(listed)}"


def test_no_list_refuses_nothing() -> None:
    assert reason(Urls(UrlConfig()), "http://bad.example/casino") is None


def test_a_list_that_cannot_be_read_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^url\.blocklists=.*nowhere: No such file"):
        Urls(UrlConfig(blocklists=[str(tmp_path / "nowhere")]))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(UserError, match=r"^url\.words=.*empty: no word in it"):
        Urls(UrlConfig(words=[str(tmp_path / "empty")]))


def test_ut1s_lists_are_refused(shared_data: Path) -> None:
    path = shared_data / "web/lists/ut1-gambling.domains.txt"
    step = Urls(UrlConfig(blocklists=[str(path)]))
    listed = path.read_text().split()
    assert {reason(step, f"http://www.{domain}/") for domain in listed[::97]} == {"domain"}
    assert reason(step, "https://www.example.com/") is None


def test_a_domain_of_the_config_is_read_as_hosts_are() -> None:
    step = Urls(UrlConfig(domains=["bücher.de", ".Example.ORG."]))
    assert reason(step, "http://www.xn--bcher-kva.de/x") == "domain" == reason(step, "https://a.example.org/")
    with pytest.raises(UserError, match=r"url\.domains: 'http://x\.com/' is no domain"):
        Urls(UrlConfig(domains=["http://x.com/"]))

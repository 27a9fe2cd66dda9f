"""Reddit's submissions to links: each rule by itself, and of the links to one page the best."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from conf.errors import UserError
from data_pipeline.corpus.document import Document, Dropped
from data_pipeline.corpus.inputs import files_at
from data_pipeline.corpus.lines import lines
from data_pipeline.prepare.recipe_config import LinksConfig
from data_pipeline.prepare.web.links import DUPLICATE, Link, Linked, links, read_links, write_links
from data_pipeline.prepare.web.urls import normalize
from tests.helpers.seeds import seeded


def post(url: str, score: int = 5, second: float | str = 1_500_000_000, **more: Any) -> dict[str, Any]:
    return {"url": url, "score": score, "created_utc": second, "over_18": False, "is_self": False, **more}


def dump(path: Path, *posts: Any) -> Path:
    lines = (p if isinstance(p, bytes) else json.dumps(p).encode() for p in posts)
    pack: Callable[[bytes], bytes] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }.get(path.suffix, bytes)
    path.write_bytes(pack(b"".join(line + b"\n" for line in lines)))
    return path


def found(path: Path, **cfg: Any) -> list[Link | Dropped]:
    return list(links(files_at(str(path)), LinksConfig(**cfg)))


def reasons(path: Path, **cfg: Any) -> Counter[str]:
    return Counter(item.reason for item in found(path, **cfg) if isinstance(item, Dropped))


def test_each_rule_has_a_reason_and_no_line_is_lost(tmp_path: Path) -> None:
    """Each rule has its reason, and every line is counted."""
    end = 1_514_764_800  # 2018-01-01
    path = dump(
        tmp_path / "RS_2017",
        post("http://good.example/a?x=1&amp;y=2", subreddit="news"),
        post("http://low.example/", score=2),
        post("http://late.example/", second=end),
        post("http://last.example/", second=str(end - 1.0)),
        post("http://adult.example/", over_18=True),
        post("https://www.reddit.com/r/a/comments/1", is_self=True),
        post("https://old.reddit.com/r/a/comments/1"),
        post("/r/a/comments/1"),
        post("ftp://files.example/a"),
        post("http://en.wikipedia.org/wiki/A"),
        post("http://notwikipedia.org/wiki/A"),
        post("http://pics.example/a.JPG?size=1"),
        b"{not json",
        b"",
        {"title": "no link"},
        post("http://no.date/", second="soon"),
        [1],
    )
    got = found(path, until="2017-12-31", skip_hosts=["wikipedia.org"], skip_endings=[".jpg"])
    assert [item for item in got if isinstance(item, Link)] == [
        Link("http://good.example/a?x=1&y=2", 5, "2017-07-14T02:40:00Z", "news"),
        Link("http://last.example/", 5, "2017-12-31T23:59:59Z"),
        Link("http://notwikipedia.org/wiki/A", 5, "2017-07-14T02:40:00Z"),
    ]
    assert len(got) == 17
    assert [(d.reason, d.path.rpartition(":")[2]) for d in got if isinstance(d, Dropped)] == [
        ("a score below min_score", "2"),
        ("submitted after links.until", "3"),
        ("for adults", "5"),
        ("a text of its own, no link", "6"),
        ("a link within Reddit", "7"),
        ("not a web address", "8"),
        ("not a web address", "9"),
        ("a host of links.skip_hosts", "10"),
        ("an ending of links.skip_endings", "12"),
        ("not JSON", "13"),
        ("an empty line", "14"),
        ("not a submission with a url, a score and a date", "15"),
        ("not a submission with a url, a score and a date", "16"),
        ("not a submission with a url, a score and a date", "17"),
    ]
    assert reasons(path, over_18=True)["for adults"] == 0
    with pytest.raises(UserError, match=r"links.until=2017: give a day as YYYY-MM-DD"):
        found(path, until="2017")


def test_the_best_then_oldest_then_first_link_to_a_page_stays(tmp_path: Path) -> None:
    """Of the links to one page the one of the best score stays, of those the oldest, of those the first."""
    seed = seeded()
    rng = np.random.default_rng(seed)
    spelled = ["http://{}.org/p", "https://www.{}.org/p/", "HTTP://{}.ORG:80/p#top", "http://user@{}.org/./p"]
    posts = [
        post(spelled[rng.integers(4)].format(f"host{rng.integers(30)}"), int(rng.integers(3, 6)), int(rng.integers(9)))
        for _ in range(400)
    ]
    for i in range(2):
        dump(tmp_path / f"RS_{i}.zst", *posts[i * 200 : i * 200 + 200])
    best: dict[str, tuple[int, int, int]] = {}
    for n, p in enumerate(posts):
        host = p["url"].lower().split("host")[1].split(".")[0]
        best[host] = min(best.get(host, (0, 0, 0)), (-p["score"], p["created_utc"], n))
    got = found(tmp_path)
    chosen = sorted(n for _, _, n in best.values())
    expected = [(posts[n]["score"], f"1970-01-01T00:00:0{posts[n]['created_utc']}Z") for n in chosen]
    assert [(x.score, x.date) for x in got if isinstance(x, Link)] == expected, f"seed {seed}"
    assert Counter(x.reason for x in got if isinstance(x, Dropped)) == {DUPLICATE: 400 - len(best)}, f"seed {seed}"


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_compression_of_a_dump_is_read(tmp_path: Path, suffix: str) -> None:
    """Every compression of a dump is read, and a dump that is cut off says so."""
    posts = [post(f"http://x.org/{secrets.token_hex(40)}") for _ in range(1000)]
    path = dump(tmp_path / f"RS{suffix}", *posts)
    assert [x.url for x in found(path) if isinstance(x, Link)] == [p["url"] for p in posts]
    raw = path.read_bytes()
    path.write_bytes(raw + raw)
    assert reasons(path) == {DUPLICATE: 1000}
    path.write_bytes(raw[: len(raw) // 2 - 7])
    (reason,) = reasons(path)
    assert reason == "not JSON" if not suffix else reason.startswith("the rest of the file cannot be read")


def test_a_dump_of_pushshifts_long_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=False)
    path = tmp_path / "RS.zst"
    with path.open("wb") as f, zstandard.ZstdCompressor(compression_params=parameters).stream_writer(f) as packed:
        packed.write(json.dumps(post("http://x.org/")).encode() + b"\n")
    assert [x.url for x in found(path) if isinstance(x, Link)] == ["http://x.org/"]
    ((refused, _),) = lines(files_at(str(path))[0], 1000)  # what only this reader allows
    assert isinstance(refused, Dropped) and "memory" in refused.reason


def test_written_links_are_the_same_each_time_and_choose_pages(tmp_path: Path) -> None:
    """Written links are whole, the same bytes each time, and choose pages."""
    path = dump(tmp_path / "RS", post("http://a.org/1"), post("https://www.b.org/"), post("http://c.org/", score=1))
    passages = [write_links(files_at(str(path)), LinksConfig(), tmp_path / out) for out in ("one", "two")]
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"links.jsonl.zst", "keys.npy", "links.json"}
    for name in ("links.jsonl.zst", "keys.npy", "links.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    passage = passages[0]
    assert passage.taken.documents == passage.given.documents + sum(t.documents for t in passage.dropped.values()) == 3
    assert passage.samples == {"a score below min_score": [{"id": "RS:3", "url": None, "text": ""}]}
    assert [x.url for x in read_links(tmp_path / "one" / "links.jsonl.zst")] == ["http://a.org/1", "https://www.b.org/"]
    step = Linked(tmp_path / "one")
    urls = ["https://a.org/1", "http://a.org/2", "http://b.org", "no address", None]
    pages = [Document("", "", metadata={"url": url} if url else {}) for url in urls]
    assert step.apply(pages) == [None, "not linked", None, "not linked", "not linked"]
    dump(path, post("http://c.org/", score=1))
    write_links(files_at(str(path)), LinksConfig(), tmp_path / "one")
    assert Linked(tmp_path / "one").apply(pages) == ["not linked"] * 5


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://Ex.ORG", "http://ex.org/"),
        ("https://ex.org:443/a b?q=ü#f", "https://ex.org/a%20b?q=%C3%BC"),
        ("http://ex.org:8080/%7e%2f/100%", "http://ex.org:8080/~%2F/100%25"),
        ("http://ex.org/a/../../b/./c/..", "http://ex.org/b/"),
        ("http://müller.example/", "http://xn--mller-kva.example/"),
        ("http://[::1]/x", "http://[::1]/x"),
        ("http://ex.org./", "http://ex.org/"),
        ("javascript:alert(1)", None),
        ("http:///a", None),
        ("http://a b/", None),
        ("http://ex.org:99999/", None),
        ("http://ex.org/" + "a" * 3000, None),
        ("http://[::1/", None),
    ],
)
def test_an_address_has_one_normal_form(url: str, expected: str | None) -> None:
    normal = normalize(url)
    assert (normal and str(normal)) == expected
    if normal:
        assert normalize(str(normal)) == normal


def test_a_real_dump_gives_what_a_plain_reading_of_it_gives(shared_data: Path) -> None:
    path = shared_data / "web" / "links" / "RS_v2_2005-06.xz"
    posts = [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
    plain = {p["url"].replace("&amp;", "&") for p in posts if p["score"] >= 3 and not p["over_18"]}
    got = found(path, until="2017-12-31", skip_hosts=["wikipedia.org"])
    assert len(got) == len(posts) == 103
    kept = [x for x in got if isinstance(x, Link)]
    assert {normalize(x.url) for x in kept} == {normalize(url) for url in plain} and len(kept) == len(plain) > 80

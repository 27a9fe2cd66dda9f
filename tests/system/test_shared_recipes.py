"""Every recipe by the real command over real pages, links, books and tables, from raw files to verified shards."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from html import unescape
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest

from data_pipeline.corpus.inputs import Input
from data_pipeline.prepare.readers import read_published
from tests.helpers.archives import Made, squeeze
from tests.helpers.crawls import SMALL, STEPS, drops, html, made_by, prose, report, result
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from tests.helpers.sites import Reply, site

pytestmark = pytest.mark.slow
SOURCES = ("webtext2", "wikipedia", "books1", "books2", "crawl_sample", "common_crawl")


def accounted(out: Path) -> list[dict[str, Any]]:
    """The rows of a report, of which each gives what it took but for what it dropped, and takes what came before."""
    funnel, before = report(out)["funnel"], None
    for row in funnel:
        lost = sum(tally["documents"] for tally in row["dropped"].values())
        assert row["taken"]["documents"] + row["split"] == row["given"]["documents"] + lost, row
        if before is not None and (row["stage"], row["step"]) != ("filter", "read"):
            assert row["taken"]["documents"] == before["documents"], row
        before = row["given"]
    return funnel


def kept(out: Path) -> list[dict[str, Any]]:
    """The documents, as anyone who reads JSON lines gets them."""
    folder = out / "documents"
    docs = [d for p in sorted(folder.iterdir()) for d, _ in read_published(None, Input(p, p.name, 0, 0), 0)]
    assert len({d.id for d in docs}) == len(docs) == report(out)["funnel"][-1]["given"]["documents"]
    return [{"id": d.id, "text": d.text, **d.metadata} for d in docs]


def sharded(out: Path, shards: Path, *words: str) -> None:
    """Documents become shards that verify, every one of them."""
    for command in (
        ["write", "corpus=jsonl", f"corpus.path={out / 'documents'}", "tokenizer=gpt2", f"output={shards}", *words],
        ["verify", f"path={shards}"],
    ):
        words_ = [sys.executable, "-m", "data_pipeline.shards", *command]
        done = subprocess.run(words_, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    body = json.loads((shards / "report.json").read_text())
    assert body["kept"] == len(kept(out)) == body["train"]["documents"] + body["val"]["documents"]
    assert not body["dropped"]


def records(path: Path) -> int:
    """How many an archive has: FastWARC's count of a whole one, version lines of one that is cut off or has LF."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    if path.name.endswith(".paths.gz"):
        return 1  # no archive: one thing that is dropped
    if path.name == "sample.wet.txt":
        return len(re.findall(rb"(?m)^WARC/1\.\d$", path.read_bytes()))
    if path.name.startswith("clipped"):
        return len(re.findall(rb"(?m)^WARC/1\.\d\r$", readable(path.read_bytes())))
    with path.open("rb") as file:
        return sum(1 for _ in ArchiveIterator(file, parse_http=False, record_types=WarcRecordType.any_type))


def readable(data: bytes) -> bytes:
    """What a gzip file gives before it is cut off."""
    parts = []
    while data:
        unzip = zlib.decompressobj(31)
        parts.append(unzip.decompress(data))
        data = unzip.unused_data
    return b"".join(parts)


def gold(shared: Path) -> list[tuple[str, bytes]]:
    """(address, page) of the gold pages."""
    folder = shared / "web" / "extraction"
    truth = json.loads((folder / "ground-truth.json").read_text())
    return [(truth[k]["url"], gzip.decompress((folder / "html" / f"{k}.html.gz").read_bytes())) for k in sorted(truth)]


def archive(path: Path, pages: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = (
        Made(body, id=f"urn:{path.name}:{i}", url=url, head=["Content-Type: text/html"])
        for i, (url, body) in enumerate(pages)
    )
    path.write_bytes(b"".join(squeeze(m.warc()) for m in made))
    return path


def dump(path: Path, urls: list[str]) -> Path:
    posts = [{"url": url, "score": 5, "created_utc": 1400000000 + i, "subreddit": "x"} for i, url in enumerate(urls)]
    path.write_text("".join(json.dumps(post) + "\n" for post in posts))
    return path


def articles(text: str) -> list[dict[str, str]]:
    """WikiText's articles, each with its title."""
    cut = re.split(r"(?m)^ = ([^=].*[^=]) = \n", text)
    return [{"id": f"wiki-{i}", "text": body} for i, body in enumerate(cut[2::2])]


def test_a_crawl_of_real_archives_is_counted_to_the_record(shared_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "crawl"
    source.mkdir()
    web = shared_data / "web"
    for path in [*(web / "warc").iterdir(), *(web / "commoncrawl-2024").iterdir(), web / "ccnet" / "sample.wet.txt"]:
        shutil.copyfile(path, source / path.name)
    given = ["corpus=common_crawl", "corpus.recipe.extractor=fast", f"input={source}"]
    out = made_by(*given, f"output={tmp_path / 'out'}")
    funnel = accounted(out)
    expected = {path.name: records(path) for path in source.iterdir()}
    assert funnel[0]["taken"]["documents"] == sum(expected.values()), expected
    assert drops(out)["the archive is cut off"] == 1 == drops(out)["not a web archive"]
    docs = kept(out)
    assert len(docs) >= 30 and {d["language"] for d in docs} == {"en"}
    assert {d["path"].split(":")[0] for d in docs} > {"archiveorg-2008.warc.gz", "wget-2024-ai2.warc.gz"}
    assert sum(d["tokens"] for d in docs) == funnel[-1]["given"]["tokens"]
    sharded(out, tmp_path / "shards")


def test_pages_of_an_archive_that_reddit_linked_become_webtext(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "web" / "links" / "RS_v2_2005-06.xz"
    posts = [json.loads(line) for line in lzma.decompress(source.read_bytes()).splitlines()]
    good = [p for p in posts if p["score"] >= 3 and not p["over_18"] and not p["is_self"]]
    linked = {unescape(p["url"]) for p in good}  # Reddit writes &amp;
    linked = {u for u in linked if not re.search(r"(wikipedia\.org|reddit\.com)$", urlsplit(u).hostname or "")}
    linked = {u for u in linked if not urlsplit(u).path.endswith((".pdf", ".jpg", ".gif", ".png", ".mp3"))}
    pages, urls = gold(shared_data), sorted(linked)
    urls = urls[:60] + [url for url, _ in pages[60:]]  # the rest keep their own addresses, which nobody linked
    warc = archive(tmp_path / "pages.warc.gz", [(u, body) for u, (_, body) in zip(urls, pages, strict=True)])
    given = ["corpus.recipe.extractor=fast", f"corpus.recipe.links.pages={warc}", f"input={source}"]
    out = made_by("corpus=webtext", *given, f"output={tmp_path / 'out'}")
    rows = {(row["stage"], row["step"]): row for row in accounted(out)}
    assert rows["links", "links"]["taken"]["documents"] == len(posts) == 103
    assert rows["links", "links"]["given"]["documents"] == len(linked)
    low = sum(p["score"] < 3 for p in posts)
    assert rows["links", "links"]["dropped"]["a score below min_score"]["documents"] == low > 0
    assert rows["filter", "read"]["taken"]["documents"] == 120
    assert {k: v["documents"] for k, v in rows["filter", "links"]["dropped"].items()} == {"not linked": 60}
    docs = kept(out)
    assert len(docs) >= 40 and {d["url"] for d in docs} <= set(urls[:60])
    sharded(out, tmp_path / "shards")


def test_pages_are_fetched_once_whatever_is_run_again(tmp_path: Path) -> None:
    seed = seeded()
    rng = Random(seed)
    with site() as server:
        server.put("/robots.txt", Reply(b"User-agent: *\nDisallow: /private\n", headers={"Content-Type": "text/plain"}))
        paths = [f"/page{i}" for i in range(12)]
        for path in paths:
            server.put(path, html(prose(rng)))
        server.put("/private", html(prose(rng)))
        server.move("/moved", "/page3")
        urls = [server.url(path) for path in [*paths, "/private", "/moved", "/gone"]]
        source = dump(tmp_path / "RS_made.jsonl", urls)
        fetch = {"agent": "'tests (tests@example.org)'", "private": "true", "per_host_s": "0.01", "files": "2"}
        given = [f"corpus.recipe.fetch.{key}={value}" for key, value in fetch.items()]
        given += ["corpus=webtext", "corpus.recipe.extractor=fast", "corpus.recipe.language.min_score=0.2"]
        given += [f"input={source}", f"output={tmp_path / 'out'}"]
        out = made_by(*given)
        rows = {(row["stage"], row["step"]): row for row in accounted(out)}
        asked = Counter(path for _, _, path in server.asked)
        assert [asked[path] for path in paths] == [1] * 3 + [asked["/page3"]] + [1] * 8, asked
        assert asked["/page3"] <= 2 and asked["/private"] == 0
        assert rows["fetch", "fetch"]["taken"]["documents"] == 15
        docs, made = kept(out), result(out)
        assert {d["url"] for d in docs} <= {*urls, server.url("/page3")} and len(docs) >= 10, (seed, drops(out))
        made_by(*given)
        shutil.rmtree(out / "work" / "logs")  # as if each stage had been killed at its very end
        made_by(*given)
        assert Counter(path for _, _, path in server.asked) == asked and result(out) == made, f"seed {seed}"


def test_books_tables_and_lines_are_documents(shared_data: Path, tmp_path: Path) -> None:
    """Books as text and EPUB, Parquet tables and JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    novels = sorted((shared_data / "text" / "novels").iterdir())
    books = tmp_path / "books"
    shutil.copytree(novels[0].parent, books)
    epub(books / "alice.epub", (novels[0].parent / "11_alices_adventures_in_wonderland.txt").read_text())
    epub(books / "frog.epub", "A frog. " * 2000)
    (books / "leaflet.txt").write_text("Much too short.")
    out = made_by("corpus=books", f"input={books}", f"output={tmp_path / 'b'}")
    assert accounted(out)[0]["taken"]["documents"] == len(novels) + 3
    assert drops(out) == {"too few characters": 1, "the same text": 1}
    names = {d["id"]: d["text"] for d in kept(out)}
    assert names.keys() == {"frog.epub"} | {path.name for path in novels}
    for path in novels:
        assert names[path.name] == path.read_bytes().decode(), path
    sharded(out, tmp_path / "bs", "val_fraction=0.2")

    lines = shared_data / "web" / "ccnet" / "cc_en_head-0174.jsonl.gz"
    bodies = [json.loads(line) for line in gzip.decompress(lines.read_bytes()).splitlines()]
    rows = [*bodies, {"id": "none", "text": ""}]
    columns: dict[str, list[str]] = {key: [row[key] for row in rows] for key in ("text", "id")}
    columns |= {"url": [row["id"] for row in rows], "date": ["2020-06-05T04:25:29Z"] * 11, "dump": ["CC"] * 11}
    pq.write_table(pa.table(columns), tmp_path / "fineweb.parquet", row_group_size=4)
    texts = sorted(shared_data.glob("text/*.txt"))
    for words, expected, lost in (
        (["corpus=jsonl", f"input={lines.parent}/*.jsonl.gz"], {b["id"]: b["text"] for b in bodies}, {}),
        (["corpus=parquet", f"input={tmp_path}/fine*"], {b["id"]: b["text"] for b in bodies}, {"empty": 1}),
        (["corpus=text", f"input={shared_data}/text/*.txt"], {p.name: p.read_bytes().decode() for p in texts}, {}),
    ):
        out = made_by(*words, f"output={tmp_path / words[0][7:]}")
        accounted(out)
        assert {d["id"]: d["text"] for d in kept(out)} == expected and drops(out) == lost, words
    assert kept(tmp_path / "parquet")[0]["url"] == bodies[0]["id"]


def epub(path: Path, text: str) -> None:
    box = '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="b.opf"/>'
    item = '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/>'
    opf = (
        f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{item}</manifest><spine><itemref idref="a"/></spine>'
    )
    paragraphs = "".join(f"<p>{p}</p>" for p in text.replace("&", "&amp;").replace("<", "&lt;").split("\n\n"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("META-INF/container.xml", f"{box}</rootfiles></container>")
        book.writestr("b.opf", f"{opf}</package>")
        book.writestr("a.xhtml", f'<html xmlns="http://www.w3.org/1999/xhtml"><body>{paragraphs}</body></html>')


def test_gpt3s_mixture_is_made_of_all_its_sources(shared_data: Path, tmp_path: Path) -> None:
    pages, web = gold(shared_data), shared_data / "web"
    linked, planted = pages[:70], [(f"http://planted.example/{i}", body) for i, (_, body) in enumerate(pages[:20])]
    warc = archive(tmp_path / "linked.warc.gz", linked)
    archive(tmp_path / "crawl" / "planted.warc.gz", planted)
    archive(tmp_path / "crawl" / "others.warc.gz", pages[70:])
    for name in ("wget-2024-ai2.warc.gz", "commoncrawl-2020.warc.gz"):
        shutil.copyfile(web / "warc" / name, tmp_path / "crawl" / name)
    wiki = articles((shared_data / "text" / "wikitext-2.valid.txt").read_text())
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps(article) + "\n" for article in wiki))
    novels = sorted((shared_data / "text" / "novels").iterdir())
    for i, path in enumerate(novels):
        (tmp_path / f"books{1 + i % 2}").mkdir(exist_ok=True)
        shutil.copyfile(path, tmp_path / f"books{1 + i % 2}" / path.name)
    paths = {
        "webtext2": dump(tmp_path / "RS_made.jsonl", [url for url, _ in linked]),
        "wikipedia": tmp_path / "wiki.jsonl",
        "books1": tmp_path / "books1",
        "books2": tmp_path / "books2",
        "crawl_sample": web / "warc" / "archiveorg-2008.warc.gz",
        "common_crawl": tmp_path / "crawl",
    }
    out = tmp_path / "out"
    given = [f"corpus.sources.{name}.path={path}" for name, path in paths.items()]
    given += [f"corpus.sources.{name}.recipe.extractor=fast" for name in ("webtext2", "common_crawl")]
    given += [f"corpus.sources.webtext2.recipe.links.pages={warc}", "corpus=gpt3_mix", f"output={out}"]
    made_by(*given)
    before = {name: result(out / name) for name in SOURCES}
    docs = {name: kept(out / name) for name in SOURCES if accounted(out / name)}
    assert {name for name in SOURCES if docs[name]} == set(SOURCES)
    assert len(docs["wikipedia"]) == len(wiki) and len(docs["books1"]) == len(docs["books2"]) == 5
    rows = {(row["stage"], row["step"]): row for row in report(out / "common_crawl")["funnel"]}
    assert rows["filter", "quality"]["dropped"]["quality"]["documents"] > 0
    assert all(0 <= d["score"] <= 1 for d in docs["common_crawl"])
    webtext = {d["url"] for d in docs["webtext2"]}
    left = [d["url"] for d in docs["common_crawl"] if "planted" in d["url"]]
    assert len(webtext) >= 40 and all(linked[int(url.rpartition("/")[2])][0] not in webtext for url in left)
    removed = sum(n for reason, n in drops(out / "common_crawl").items() if reason.endswith(" as in webtext2"))
    assert removed >= 5, drops(out / "common_crawl")
    made_by(*given)
    assert {name: result(out / name) for name in SOURCES} == before

    for name in SOURCES:
        if name != "crawl_sample":
            sharded(out / name, tmp_path / "shards" / name, "val_fraction=0")
    words = ["data=gpt3_mix", f"data.path={tmp_path / 'shards'}", "n_ctx=128", "tokens_per_step=16384", "steps=0:4"]
    order = [sys.executable, "-m", "data_pipeline.order", *words, "json=true"]
    done = subprocess.run(order, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = Counter(json.loads(line)["source"] for line in done.stdout.splitlines())
    assert seen.total() == 4 * 128 and set(seen) == {*SOURCES} - {"crawl_sample"}
    assert abs(seen["common_crawl"] / seen.total() - 60 / 101) < 0.02


def grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[k : k + 13]) for k in range(len(words) - 12)}


def test_evaluation_text_is_cut_out_and_told(shared_data: Path, tmp_path: Path) -> None:
    seed = seeded()
    rng = Random(seed)
    sets = shared_data / "eval" / "lambada_test.jsonl"
    examples = [" ".join(json.loads(line)["text"].split()) + "." for line in sets.read_text().splitlines()]
    chosen = rng.sample([i for i, text in enumerate(examples) if 60 < len(text.split()) < 90 and "{" not in text], 10)
    pages = []
    for i in range(40):
        text = prose(rng, 14)
        if i < len(chosen):
            text.insert(7, examples[chosen[i]])
        pages.append((f"http://example.org/{i}", html(text)))
    source = archive(tmp_path / "crawl" / "a.warc.gz", pages)
    given = [*STEPS, *SMALL, f"input={source}", f"corpus.recipe.decontaminate.sets=[{sets}]"]
    out = made_by(*given, f"output={tmp_path / 'out'}")
    accounted(out)
    whole = kept(made_by(*given[:-1], f"output={tmp_path / 'whole'}"))
    dirty = {int(d["url"].rpartition("/")[2]) for d in whole if int(d["url"].rpartition("/")[2]) < len(chosen)}
    assert len(dirty) >= 5, (seed, drops(tmp_path / "whole"))
    (found,) = report(out)["evaluation"]["sets"].values()
    put = {gram for i in dirty for gram in grams(examples[chosen[i]])}
    expected = [i for i, text in enumerate(examples) if not put.isdisjoint(grams(text))]  # a book has several examples
    assert found["examples"] == len(examples) and found["dirty_examples"] == expected, seed
    texts = " ".join(" ".join(re.findall(r"\w+", d["text"].lower())) for d in kept(out))
    for i in dirty:
        assert not any(gram in texts for gram in grams(examples[chosen[i]])), (seed, chosen[i])
    clean = {d["id"] for d in whole if int(d["url"].rpartition("/")[2]) >= len(chosen)}
    assert clean <= {d["id"] for d in kept(out)}, seed
    assert sum(row["split"] for row in report(out)["funnel"]) > 0

"""What would break a reader of archives costs itself alone: counted with its reason, in bounded memory."""

from __future__ import annotations

import gzip
import subprocess
import threading
import time
from pathlib import Path
from random import Random

import pytest

from tests.helpers.archives import Made, squeeze
from tests.helpers.crawls import STEPS, command, drops, html, prose
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded
from tests.system.test_shared_recipes import accounted, kept

pytestmark = pytest.mark.slow
MIB = 1 << 20


def memory_of(pid: int) -> int:
    """Bytes that a process and all below it hold (RSS; what they share is counted for each)."""
    total, left = 0, [pid]
    while left:
        process = left.pop()
        try:
            left += map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
    return total


def highest(words: list[str]) -> int:
    """Runs a command to its end; the most memory that was seen of it and its workers together."""
    process, most = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True), [0]

    def watch() -> None:
        while process.poll() is None:
            most[0] = max(most[0], memory_of(process.pid))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, said = process.communicate()
    watcher.join()
    assert process.returncode == 0, said[-3000:]
    return most[0]


def hostile(folder: Path, rng: Random) -> int:
    """Archives with one bad record in each, between good ones; how many are good."""
    folder.mkdir()
    count = 0

    def good(strange: bytes = b"") -> Made:
        nonlocal count
        count += 1
        page = html(prose(rng)).replace(b". ", strange + b". ", 3)
        return Made(page, id=f"urn:{count}", url=f"http://example.org/good{count}")

    def put(name: str, *pieces: bytes) -> None:
        (folder / name).write_bytes(b"".join(pieces))

    bomb = gzip.compress(Made(bytes(900 * MIB), url="http://example.org/bomb").warc(), 6)
    put("bomb.warc.gz", squeeze(good().warc()), bomb, squeeze(good().warc()))
    inner = gzip.compress(b"<p>" + b"spam " * (60 * MIB), 6)
    encoded = Made(inner, url="http://example.org/inner", head=["Content-Type: text/html", "Content-Encoding: gzip"])
    put("inner_bomb.warc.gz", squeeze(good().warc()), squeeze(encoded.warc()), squeeze(good().warc()))
    put("truncated.warc.gz", squeeze(good().warc()), squeeze(Made(html(prose(rng))).warc())[:700])
    wrong = Made(html(prose(rng)), url="http://example.org/wrong", length=1700)
    put("wrong_length.warc", good().warc(), wrong.warc(), good().warc())
    words = " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(MIB // 7)).encode()
    page = Made(b"<p>" + words * 100, url="http://example.org/huge")
    put("huge.warc", good().warc(), page.warc(), good().warc())
    put("huge.warc.gz", squeeze(good().warc()), gzip.compress(page.warc(), 1), squeeze(good().warc()))
    deep = b"".join(b"<div id=%x>" % rng.getrandbits(64) for _ in range(300_000))
    nested = Made(b"<html><body>" + deep + b"deep", url="http://example.org/nested")
    put("nested.warc.gz", squeeze(good().warc()), squeeze(nested.warc()), squeeze(good().warc()))
    invalid = Made(bytes(range(256)) * 80, url="http://example.org/invalid")
    header = Made(b"<p>x", url="http://example.org/header").warc().replace(b"header", b"\xff\xfe\x80")
    strange = good(b" \xff\xfe\xc3(").warc()
    put("invalid.warc.gz", squeeze(good().warc()), squeeze(invalid.warc()), squeeze(header), squeeze(strange))
    put("no_archive.warc.gz", rng.randbytes(30_000))
    return count


def test_a_hostile_crawl_loses_what_is_hostile_and_nothing_else(tmp_path: Path) -> None:
    seed = seeded()
    expected = hostile(tmp_path / "crawl", Random(seed))
    given = [f"input={tmp_path / 'crawl'}", f"output={tmp_path / 'out'}", "task_mib=0.001", "executor.workers=2"]
    most = highest(command(*STEPS, *given, "corpus.recipe.extractor=best"))
    out = tmp_path / "out"
    funnel, found = accounted(out), drops(out)
    assert {d["url"] for d in kept(out)} == {f"http://example.org/good{i + 1}" for i in range(expected)}, (seed, found)
    assert found == {
        "it expands beyond limits.ratio": 1,  # the bomb
        "it is larger than limits.page_mib": 3,  # the page of 100 MB twice, the bomb in the content's own encoding
        "its length is wrong": 1,
        "the archive is cut off": 1,
        "not a web archive": 1,
        "neither HTML nor plain text": 1,
        "no text": 2,  # the nested page, the one with an invalid header
    }
    assert funnel[0]["taken"]["documents"] == expected + 10
    assert most < 2 * 1024 * MIB, f"{most / MIB:.0f} MiB"

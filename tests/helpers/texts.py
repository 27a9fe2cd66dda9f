"""Real texts of many kinds for the rules, and the same made worse, so that each rule finds something."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

NOVEL_PIECES = 60  # of each novel
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}


def texts(shared: Path) -> list[str]:
    """Pages of web archives, gold pages with all that is around their text, CCNet, novels in pieces, Wikipedia, and the
    Universal Declaration of Human Rights in hundreds of languages."""
    return [text for text in [*pages(shared / "web"), *books(shared / "text")] if text.strip()]


def pages(web: Path) -> Iterator[str]:
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    for path in sorted((web / "warc").glob("*.warc.gz")):
        if path.name.startswith("clipped"):
            continue
        with path.open("rb") as stream:
            for record in ArchiveIterator(stream, record_types=WarcRecordType.response):
                if "html" in (record.http_content_type or ""):
                    page = record.reader.read()
                    yield extract_plain_text(bytes_to_str(page, detect_encoding(page)), main_content=True)
    for path in sorted((web / "extraction/html").glob("*.gz")):
        yield extract_plain_text(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"), main_content=False)
    for line in gzip.decompress((web / "ccnet/cc_en_head-0174.jsonl.gz").read_bytes()).splitlines():
        body = json.loads(line)
        yield body.get("text") or body.get("raw_content")


def books(text: Path) -> Iterator[str]:
    rng = Random(7)
    for path in sorted((text / "novels").glob("*.txt")):
        novel, start = path.read_text(encoding="utf-8", errors="replace"), 0
        for _ in range(NOVEL_PIECES):
            size = rng.randrange(300, 5000)
            yield novel[start : start + size]
            start += size
    wiki = (text / "wikitext-2.valid.txt").read_text(encoding="utf-8")
    yield from (article[:8000] for article in re.split(r"\n = [^=].*? = \n", wiki))
    with zipfile.ZipFile(text / "udhr2.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt"):
                yield archive.read(name).decode("utf-8", "replace")[:3000]


def made_worse(rng: Random, text: str) -> str:
    """`text` with one of the faults that rules look for."""
    words, lines = text.split(), text.split("\n")

    def inserted(size: int, times: int) -> str:
        start = rng.randrange(len(words))
        gram, out = words[start : start + size], list(words)
        for _ in range(times):
            to = rng.randrange(len(out) + 1)
            out[to:to] = gram
        return " ".join(out)

    def rows(size: int, begin: str = "", ends: tuple[str, ...] = ("",)) -> str:
        return "\n".join(begin + " ".join(words[i : i + size]) + rng.choice(ends) for i in range(0, len(words), size))

    faults = (
        lambda: inserted(rng.randrange(1, 8), rng.randrange(2, 60)),
        lambda: inserted(rng.randrange(8, 40), rng.randrange(1, 12)),
        lambda: "\n".join([*lines, *rng.choices(lines, k=rng.randrange(1, len(lines) + 2))]),
        lambda: "\n\n".join(rng.choices(text.split("\n\n"), k=8)),
        lambda: " ".join(words[: rng.randrange(30, 80)]),
        lambda: rows(5, "- "),
        lambda: rows(12, ends=("...", "…", ".")),
        lambda: rows(rng.randrange(2, 5)),
        lambda: " ".join(rng.choice(["#", "...", "…", ""]) * rng.randrange(2) + word for word in words),
        lambda: " ".join(rng.choice([word, str(rng.randrange(9999)), ":)", "$5", "(a)", "--"]) for word in words),
        lambda: "".join(word + rng.choice([""] * 8 + [" "]) for word in words),
        lambda: " ".join(word[:2] for word in words),
        lambda: text + rng.choice([" lorem ipsum dolor", " f() { return 1; }", "\nJavaScript is on.\nWe use cookies."]),
        lambda: "\n".join(rng.choice([line, line.rstrip(".!?")]) for line in lines),
        lambda: " ".join(word for word in words if word.lower() not in STOP_WORDS),
        lambda: rows(6, ends=(".", ". [1]", ".  [2]", ". (Mr. X)", "!")),
        lambda: ". ".join(" ".join(words[i : i + 6]) for i in range(0, rng.randrange(12, 60), 6)) + ".  [1]",
    )  # fmt: skip
    return rng.choice(faults)()


def corpus(shared: Path, number: int, seed: int, size: int) -> list[str]:
    """`number` texts of about `size` characters at most, half of them made worse."""
    rng = Random(seed)
    base = [text[:size] for text in texts(shared)]
    rng.shuffle(base)
    long = [text for text in base if len(text) > 400]
    kept = base[: number // 2]
    return kept + [made_worse(rng, rng.choice(long)) for _ in range(number - len(kept))]

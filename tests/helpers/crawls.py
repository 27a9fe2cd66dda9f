"""A small made crawl, in which something falls to most rules of a recipe, and the real command over it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import zstandard

from tests.helpers.archives import KINDS, Made
from tests.helpers.ranks import ROOT

TEXT = """
the a river house stone window letter garden winter captain morning evening harbour market village mountain school
doctor story answer question number history kitchen bridge engine paper water forest island road and of to in that with
have be was were said found walked opened carried remembered waited turned looked heard quiet bright narrow heavy early
distant careful simple strange ordinary little great sudden broken golden
"""
WORDS = TEXT.split()
STEPS = (
    "corpus=common_crawl",
    "corpus.recipe.extractor=fast",
    "tokenizer=null",
    "corpus.recipe.language.min_score=0.2",
)
SMALL = ("part_mib=0.05", "task_mib=0.001")  # a task for each archive, with some parts


def sentence(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(7, 16))).capitalize() + "."


def prose(rng: Random, paragraphs: int = 8) -> list[str]:
    return [" ".join(sentence(rng) for _ in range(rng.randint(2, 5))) for _ in range(paragraphs)]


def html(paragraphs: list[str]) -> bytes:
    body = "".join(f"<p>{text}</p>" for text in paragraphs)
    links = "".join(f'<li><a href="/{i}">{word}</a></li>' for i, word in enumerate(WORDS[:8]))
    page = f"<html><head><title>A page</title></head><body><nav><ul>{links}</ul></nav><article>{body}</article></body>"
    return page.encode()


def pages(rng: Random, count: int) -> list[Made]:
    """Good pages, near and exact copies of them, bad ones of several kinds, and records that are no pages."""
    made: list[Made] = []
    earlier: list[list[str]] = []
    for i in range(count):
        text = prose(rng)
        kind = rng.choice(("good",) * 5 + ("copy", "near", "short", "repeated", "code", "missing", "request"))
        if kind == "copy" and earlier:
            text = rng.choice(earlier)
        elif kind == "near" and earlier:
            text = [*rng.choice(earlier), sentence(rng)]
        elif kind == "short":
            text = text[:1]
        elif kind == "repeated":
            text = text[:1] * 12
        elif kind == "code":
            text = [*text, "function f() { return 1; }"]
        else:
            earlier.append(text)
        name = hashlib.sha256(f"{i} {text}".encode()).hexdigest()[:16]
        status = 404 if kind == "missing" else 200
        type_ = "request" if kind == "request" else "response"
        made.append(Made(html(text), type_, f"urn:uuid:{name}", f"http://example.org/{name}", status))
    return made


def crawl(folder: Path, archives: int, count: int, seed: int) -> Path:
    """WARC files of all kinds in turn."""
    folder.mkdir(parents=True)
    kinds = ("gzip", "plain", "zstd", "one member")
    for i in range(archives):
        ending, write = KINDS[kinds[i % len(kinds)]]
        (folder / f"{i}.{ending}").write_bytes(b"".join(write(pages(Random(f"{seed} {i}"), count))))
    return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "data_pipeline.prepare.run", *words]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True)


def made_by(*words: str) -> Path:
    """The output folder of a run that ended well."""
    done = run(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(next(word for word in words if word.startswith("output=")).partition("=")[2])


def result(out: Path) -> dict[str, bytes]:
    """All that a user takes from it: the bytes of the documents and of the report."""
    kept = [out / "report.json", out / "report.html", *(out / "documents").iterdir()]
    return {path.name: path.read_bytes() for path in sorted(kept)}


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def drops(out: Path) -> dict[str, int]:
    """By reason, over all steps."""
    counts: dict[str, int] = {}
    for row in report(out)["funnel"]:
        for reason, tally in row["dropped"].items():
            counts[reason] = counts.get(reason, 0) + tally["documents"]
    return counts


def kept_ids(out: Path) -> list[str]:
    """Of the documents, in order."""
    texts = (zstandard.ZstdDecompressor().stream_reader(p.read_bytes()).read() for p in sorted(out.glob("documents/*")))
    return [json.loads(line)["id"] for text in texts for line in text.splitlines()]

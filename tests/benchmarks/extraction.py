"""Text of web pages: this project's two extractors beside the libraries they use, speed and quality on gold pages.

    python -m tests.benchmarks.extraction gold=FOLDER [rounds=5] [engines=fast,best,...]
    python -m tests.benchmarks.extraction --markdown FILE.json

Prints one JSON line. FOLDER is laid out as scrapinghub's article-extraction-benchmark: ground-truth.json
{id: {articleBody}} and html/ID.html.gz; `own` stands for pages of our own with lists, tables and code. The measure is
that benchmark's: multisets of word 4-grams, each page's precision and recall, their means over the pages, F1 of the
means.

Each measurement is a fresh process, engine after engine, round after round; the numbers are medians, a ratio is the
median of the rounds' ratios. The pages lie in memory; their decoding is part of the work. CPU seconds are user and
system of the process and of the one in which ours extracts; imports, start and a first page come before. Peak memory
is what is resident at most, of both processes, the 120 pages too. `fast` and `best` are the step as a recipe takes it,
with its limits and with ftfy; `resiliparse` (main content, no alternative texts, no comments) and `trafilatura`
(favouring precision, without what earlier pages had: datatrove's options) are those libraries alone.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from data_pipeline.prepare.recipe_config import Extractor, LimitsConfig
from tests.benchmarks import machine
from tests.benchmarks.own_pages import own_pages

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("resiliparse", "trafilatura", "lxml", "ftfy", "datatrove")
PEERS = {"fast": "resiliparse", "best": "trafilatura"}
SETTINGS = ("gold", "rounds", "engines")
COLUMNS = {  # what is measured: its heading and how it is written
    "pages_per_cpu_s": ("pages per CPU-second", lambda v: f"{v:.0f}"),
    "mb_per_cpu_s": ("MB per CPU-second", lambda v: f"{v:.1f}"),
    "f1": ("F1", lambda v: f"{v:.3f}"),
    "precision": ("precision", lambda v: f"{v:.3f}"),
    "recall": ("recall", lambda v: f"{v:.3f}"),
    "peak_mib": ("peak memory, MiB", lambda v: f"{v:.0f}"),
}

Page = bytes
Engine = tuple[Callable[[Page], str], Callable[[], list[int]]]  # a page's text; the processes that work on it


def ours(how: str) -> Engine:
    from datatrove.data import Document

    from data_pipeline.prepare.extract.extract import Extract

    step = Extract(Extractor(how), LimitsConfig())

    def text_of(html: Page) -> str:
        doc = Document("", "page", metadata={"html": html})
        step.apply([doc])
        return doc.text

    def processes() -> list[int]:
        assert step.sandbox.child is not None
        return [0, step.sandbox.child.pid]

    return text_of, processes


def resiliparse() -> Engine:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    def text_of(html: Page) -> str:
        text = bytes_to_str(html, detect_encoding(html, from_html_meta=True) or "utf-8")
        return extract_plain_text(text, main_content=True, alt_texts=False, comments=False)

    return text_of, lambda: [0]


def trafilatura() -> Engine:
    from trafilatura import extract

    def text_of(html: Page) -> str:
        return extract(html, favor_precision=True, include_comments=False, deduplicate=True) or ""

    return text_of, lambda: [0]


ENGINES: dict[str, Callable[[], Engine]] = {
    "fast": lambda: ours("fast"),
    "resiliparse": resiliparse,
    "best": lambda: ours("best"),
    "trafilatura": trafilatura,
}


def shingles(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)))


def quality(gold: list[str], found: list[str]) -> dict[str, float]:
    """F1 of the mean precision and the mean recall."""
    precisions, recalls = [], []
    for true, text in zip(map(shingles, gold), map(shingles, found), strict=True):
        both = (true & text).total()
        precisions.append(both / text.total())
        recalls.append(both / true.total())
    precision, recall = fmean(precisions), fmean(recalls)
    return {"f1": 2 * precision * recall / ((precision + recall) or 1), "precision": precision, "recall": recall}


def read_gold(folder: Path) -> tuple[list[Page], list[str]]:
    """Pages and their texts, in the order of their ids; of the folder `own`, those of own_pages.py."""
    if str(folder) == "own":
        own = own_pages().values()
        return [html for html, _ in own], [text for _, text in own]
    gold = json.loads((folder / "ground-truth.json").read_text(encoding="utf-8"))
    pages = [gzip.decompress((folder / "html" / f"{name}.html.gz").read_bytes()) for name in sorted(gold)]
    return pages, [gold[name]["articleBody"] for name in sorted(gold)]


def measure(name: str, folder: Path) -> dict[str, float]:
    """One engine over all pages, in this process."""
    pages, gold = read_gold(folder)
    text_of, processes = ENGINES[name]()
    text_of(pages[0])
    before = sum(map(machine.cpu_seconds, processes()))
    found = [text_of(page) for page in pages]
    cpu = sum(map(machine.cpu_seconds, processes())) - before
    peak = sum(machine.resident_mib(process)[1] for process in processes())
    rates = {"pages_per_cpu_s": len(pages) / cpu, "mb_per_cpu_s": sum(map(len, pages)) / 1e6 / cpu}
    return {**rates, **quality(gold, found), "peak_mib": peak}


def compare(folder: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """Everything, as one JSON object."""
    pages, _ = read_gold(folder)
    loads = [machine.load()]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            argv = [sys.executable, "-m", "tests.benchmarks.extraction", "--one", name, str(folder)]
            run = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            if run.returncode:
                raise SystemExit(f"error: {name} ended with {run.returncode}: see above")
            runs[name].append(json.loads(run.stdout))
    return {
        "benchmark": "extraction",
        "pages": len(pages),
        "bytes": sum(map(len, pages)),
        "rounds": rounds,
        "hardware": machine.hardware(),
        "load": [*loads, machine.load()],
        "versions": machine.versions(*PACKAGES),
        "engines": {name: {key: median(run[key] for run in found) for key in COLUMNS} for name, found in runs.items()},
        "ratios": {
            name: median(
                a["pages_per_cpu_s"] / b["pages_per_cpu_s"] for a, b in zip(runs[name], runs[peer], strict=True)
            )
            for name, peer in PEERS.items()
            if name in names and peer in names
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/benchmarks/extraction.md."""
    heads = ["engine", *(head for head, _ in COLUMNS.values()), "speed / its library's alone"]
    lines = [heads, ["---"] * len(heads)]
    for name, numbers in result["engines"].items():
        ratio = result["ratios"].get(name)
        cells = [text(numbers[key]) for key, (_, text) in COLUMNS.items()]
        lines.append([f"`{name}`", *cells, f"{ratio:.2f}" if ratio else "–"])
    on, v = result["hardware"], result["versions"]
    about = (
        f"{result['pages']} pages, {result['bytes'] / 1e6:.1f} MB, medians of {result['rounds']} rounds. {on['cpu']}, "
        f"{on['cores']} cores, {on['memory_gib']} GiB; load {result['load'][0]} before, {result['load'][1]} after; "
        f"{', '.join(f'{name} {number}' for name, number in v.items() if number)}."
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n{about}\n"


def main(args: list[str]) -> None:
    if args[:1] == ["--one"]:
        print(json.dumps(measure(args[1], Path(args[2]))))
        return
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text().splitlines()[-1])), end="")
        return
    given = dict(arg.partition("=")[::2] for arg in args)
    if set(given) - set(SETTINGS) or "gold" not in given:
        raise SystemExit(f"error: {' '.join(args)}: settings are {'=, '.join(SETTINGS)}=, and gold is needed")
    names = given.get("engines", ",".join(ENGINES)).split(",")
    if unknown := set(names) - set(ENGINES):
        raise SystemExit(f"error: engines={','.join(unknown)}: there are {','.join(ENGINES)}")
    print(json.dumps(compare(Path(given["gold"]), names, int(given.get("rounds", 5)))))


if __name__ == "__main__":
    main(sys.argv[1:])

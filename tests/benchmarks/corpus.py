"""The corpus pipeline beside plain datatrove's, step by step and from WARC to clean text.

    python -m tests.benchmarks.corpus warcs=FOLDER texts=FILE_OR_FOLDER [rounds=3] [documents=2000] [only=NAME,...]
    python -m tests.benchmarks.corpus --markdown FILE.json

Prints one JSON line. `warcs` are archives of pages; `texts` are plain-text files, which are cut in documents of about
4 kB, half of them again with some words changed, for deduplication and tokenizing. Both sides read the same bytes.

Each measurement is a fresh process, side after side, round after round; numbers are medians, and a ratio is the median
of the rounds' ratios. CPU seconds are user and system of the process and its children. Before they count, imports and
models are loaded, and each side's word tables have seen 150 documents of Python's own (or, for a rule alone, a hundred
pieces of its texts). A rule's MB are of text, those of the archives' rows of HTML. Peak memory is the process's own
over what it was before, and the largest child's whole. The rules' figures for few documents are still those of tables
that fill: the more documents, the faster.

datatrove's reader of archives wants packages that this project does not; peer= is a folder with them:

    pip install --no-deps --target FOLDER warcio faust-cchardet python-magic
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import machine, pipelines

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("warcs", "texts", "rounds", "documents", "only", "peer")
PACKAGES = ("datatrove", "trafilatura", "resiliparse", "fastwarc", "spacy", "fastokens", "tiktoken", "numpy")
PIECE = 4000  # characters of a document cut from `texts`


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--one"]:
        print(json.dumps(measure(*arguments[1:])))
    elif arguments[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(arguments[1]).read_text())), end="")
    else:
        given = dict(argument.split("=", 1) for argument in arguments)
        if unknown := set(given) - set(SETTINGS):
            raise SystemExit(f"error: {unknown.pop()}: give {', '.join(SETTINGS)}")
        print(json.dumps(compare(given)))


def compare(given: dict[str, str]) -> dict[str, Any]:
    rounds = int(given.get("rounds", 3))
    env = os.environ | {"PYTHONPATH": given.get("peer", "")}
    wanted = given["only"].split(",") if "only" in given else list(pipelines.ROWS)
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        bytes_of = prepare_texts(Path(given["texts"]), texts, int(given.get("documents", 2000)))
        for _ in range(rounds):
            for name in wanted:
                for side in pipelines.ROWS[name]:
                    source = given["warcs"] if pipelines.ROWS[name][side].of == "html" else str(texts)
                    command = [sys.executable, "-m", "tests.benchmarks.corpus", "--one", name, side, source]
                    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True, text=True)
                    found[name].setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
                    print(name, side, found[name][side][-1], file=sys.stderr)
    return {
        "benchmark": "corpus",
        "hardware": machine.hardware(),
        "versions": machine.versions(*PACKAGES),
        "load": machine.load(),
        "rounds": rounds,
        "texts_mb": round(bytes_of / 1e6, 2),
        "rows": {name: summed(sides) for name, sides in found.items()},
    }


def summed(sides: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for side, runs in sides.items():
        row[side] = {key: round(median(run[key] for run in runs), 3) for key in runs[0]}
    for side, runs in sides.items():
        peer = next((name for name in sides if not name.startswith("ours")), side)
        if side != peer:
            pairs = zip(runs, sides[peer], strict=True)
            row[side]["ratio"] = round(median(a["mb_per_cpu_s"] / b["mb_per_cpu_s"] for a, b in pairs), 2)
    return row


def prepare_texts(where: Path, out: Path, documents: int) -> int:
    """Bytes of the documents: pieces of the files, each second one once more with 1 to 20 % of its words changed."""
    rng = random.Random(1337)
    files = sorted(where.rglob("*.txt")) if where.is_dir() else [where]
    whole = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    pieces = [text[at : at + PIECE] for text in whole for at in range(0, len(text) - PIECE, PIECE)]
    rng.shuffle(pieces)
    total = 0
    with out.open("w") as f:
        for n, piece in enumerate(pieces[:documents]):
            words = piece.split(" ")
            for at in rng.sample(range(len(words)), int(len(words) * rng.uniform(0.01, 0.2))) if n % 2 else ():
                words[at] = rng.choice(words)
            again = [" ".join(words)] if n % 2 else []
            for k, text in enumerate([piece, *again]):
                total += len(text.encode())
                f.write(json.dumps({"id": f"{n}-{k}", "text": text}) + "\n")
    return total


def measure(name: str, side: str, source: str) -> dict[str, float]:
    """One row's side, in this process."""
    row = pipelines.ROWS[name][side]
    run: Callable[[], tuple[int, int]] = row.prepare(source)
    before, start = machine.resident_mib()[0], cpu()
    size, kept = run()
    used = cpu() - start
    peak = machine.resident_mib()[1] - before
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"mb_per_cpu_s": size / 1e6 / used, "cpu_s": used, "peak_mib": peak, "child_mib": child, "kept": kept}


def cpu() -> float:
    """User and system seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def markdown(body: dict[str, Any]) -> str:
    """The table of docs/benchmarks/corpus.md."""
    lines = [
        "| row | side | MB per CPU-second | ratio | documents kept | peak memory, MiB | a child's, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sides in body["rows"].items():
        for side, v in sides.items():
            ratio = f"{v['ratio']:.1f}" if "ratio" in v else ""
            kept = "" if name == "tokenize" else f"{v['kept']:,.0f}"  # there it is a hash of the ids
            peak, child = (f"{v[key]:,.0f}" for key in ("peak_mib", "child_mib"))
            lines.append(f"| {name} | {side} | {v['mb_per_cpu_s']:.2f} | {ratio} | {kept} | {peak} | {child} |")
    return "\n".join([*lines, "", f"{machine_of(body)}", ""])


def machine_of(body: dict[str, Any]) -> str:
    hardware, versions = body["hardware"], ", ".join(f"{k} {v}" for k, v in body["versions"].items() if v)
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    return f"{machine}; {versions}; {body['rounds']} rounds."


if __name__ == "__main__":
    main(sys.argv[1:])

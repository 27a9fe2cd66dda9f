"""This project's loader beside its peers: speed for each CPU-second, first batch, resume, memory, bytes on disk.

    python -m tests.benchmarks.loader [tokens=50_000_000] [rounds=3] [engines=ours,memmap,...] [dir=FOLDER] [json]
    python -m tests.benchmarks.loader --markdown FILE.json

Prints one JSON line; what it does meanwhile goes to stderr, with `json` nothing does. Other settings: timed= (tokens
that are timed, 4/5 of tokens), seed=, peer=FOLDER, where mosaicml-streaming lies: its requirements contradict this
project's, so it is none of them. A folder for it:

    pip install --no-deps --target FOLDER mosaicml-streaming==0.13.0 brotli xxhash 'zstd<2' python-snappy cramjam \
        catalogue

Each measurement is a fresh process on one thread (OMP_NUM_THREADS=1), engine after engine, round after round; the
numbers are medians, and a ratio is the median of the rounds' ratios. CPU seconds are user and system of all threads of
the process. They and the seconds count from the loader's construction, imports done before, to the last timed batch.
Peak memory is what is resident at most (pages of mapped files too) over what was after the imports. A resume is another
process that starts in the middle of the epoch; `resume_exact` says whether it served the first one's batch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks import machine
from tests.benchmarks.documents import N_CTX, size
from tests.benchmarks.engines import BATCH, ENGINES, with_peer

ROOT = Path(__file__).resolve().parents[2]
BATCH_TOKENS = BATCH * N_CTX
PACKAGES = ("torch", "numpy", "webdataset", "mosaicml-streaming")
SETTINGS = ("tokens", "rounds", "engines", "dir", "timed", "seed", "peer")
COLUMNS = {  # what is measured: its heading and how it is written
    "tokens_per_cpu_s": ("M tokens per CPU-second", lambda v: f"{v / 1e6:.1f}"),
    "tokens_per_s": ("M tokens per second", lambda v: f"{v / 1e6:.1f}"),
    "first_batch_s": ("first batch, s", lambda v: f"{v:.3f}"),
    "resume_s": ("resume at 50 %, s", lambda v: f"{v:.3f}"),
    "resume_exact": ("exact", lambda v: "yes" if v else "**no**"),
    "peak_mib": ("peak memory, MiB", lambda v: f"{v:.0f}"),
    "bytes_per_token": ("bytes on disk per token", lambda v: f"{v:.3f}"),
}


def measure(name: str, folder: Path, first: int, steps: int, mark: int) -> dict[str, float]:
    """Serve `steps` batches from step `first` on, in this process; `crc32` is the batch's of step `mark`."""
    engine = ENGINES[name]
    for module in engine.imports:
        importlib.import_module(module)
    torch.set_num_threads(1)
    after_imports, _ = machine.resident_mib()
    first_batch_s = crc32 = 0.0
    cpu, wall = machine.cpu_seconds(), time.perf_counter()
    batches = engine.batches(folder / engine.form, first)
    for step in range(first, first + steps):
        x, y = next(batches)
        if step == first:
            first_batch_s = time.perf_counter() - wall
        if step == mark:
            whole = x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype == torch.int64
            if not (whole and x.shape == y.shape == (BATCH, N_CTX) and torch.equal(x[:, 1:], y[:, :-1])):
                raise SystemExit(f"error: {name} serves another product than the others: {x.dtype} {tuple(x.shape)}")
            crc32 = zlib.crc32(y.numpy().data)
    wall, cpu = time.perf_counter() - wall, machine.cpu_seconds() - cpu
    peak = machine.resident_mib()[1] - after_imports
    batches.close()
    tokens = steps * BATCH_TOKENS
    return {
        "tokens_per_cpu_s": tokens / cpu,
        "tokens_per_s": tokens / wall,
        "first_batch_s": first_batch_s,
        "peak_mib": peak,
        "crc32": crc32,
    }


def fresh(module: str, *args: object) -> str:
    """The last line that a fresh Python prints for `-m module args`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    argv = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, args)]
    run = subprocess.run(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"error: {' '.join(argv[1:])} ended with {run.returncode}: see above")
    return (run.stdout.splitlines() or [""])[-1]


def once(name: str, folder: Path, tokens: int, timed: int, peer: str) -> dict[str, Any]:
    """One round of an engine: a run from the start, and another process that starts in the middle of the epoch."""
    half = tokens // BATCH_TOKENS // 2
    steps = max(timed // BATCH_TOKENS, half + 1)
    run = json.loads(fresh("loader", "--one", name, folder, 0, steps, half, peer))
    resumed = json.loads(fresh("loader", "--one", name, folder, half, 1, half, peer))
    return {**run, "resume_s": resumed["first_batch_s"], "resume_exact": resumed["crc32"] == run["crc32"]}


def compare(given: dict[str, str], folder: Path, quiet: bool) -> dict[str, Any]:
    """Everything, as one JSON object."""
    tokens, rounds, seed = (int(given.get(k, d)) for k, d in (("tokens", 50_000_000), ("rounds", 3), ("seed", 0)))
    timed, peer = int(given.get("timed", tokens * 4 // 5)), given.get("peer", "")
    with_peer(peer)
    wanted = given.get("engines", ",".join(ENGINES)).split(",")
    if unknown := set(wanted) - set(ENGINES):
        raise SystemExit(f"error: engines={','.join(unknown)}: there are {','.join(ENGINES)}")
    names = [name for name in wanted if all(map(importlib.util.find_spec, ENGINES[name].imports))]
    loads = [machine.load()]
    for form in dict.fromkeys(["flat", *(ENGINES[name].form for name in names)]):
        fresh("documents", folder, form, tokens, seed, peer)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names:
            found[name].append(once(name, folder, tokens, timed, peer))
            if not quiet:
                print(f"round {r + 1} of {rounds}: {name} {found[name][-1]}", file=sys.stderr)
    engines = {name: summary(runs) for name, runs in found.items()}
    for name, numbers in engines.items():
        numbers["bytes_per_token"] = size(folder / ENGINES[name].form) / tokens
    return {
        "benchmark": "loader",
        "tokens": tokens,
        "timed_tokens": timed,
        "rounds": rounds,
        "seed": seed,
        "hardware": machine.hardware(),
        "load": [*loads, machine.load()],
        "versions": machine.versions(*PACKAGES),
        "engines": engines,
        "absent": [name for name in wanted if name not in names],
        "ratios": {name: ratios(found["ours"], found[name]) for name in names if name != "ours" and "ours" in names},
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians; a resume is exact where each was."""
    numbers = {key: median(run[key] for run in runs) for key in COLUMNS if key in runs[0]}
    return {**numbers, "resume_exact": all(run["resume_exact"] for run in runs)}


def ratios(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over the peer's."""
    keys = ("tokens_per_cpu_s", "tokens_per_s", "first_batch_s", "resume_s")
    return {key: median(a[key] / b[key] for a, b in zip(ours, peer, strict=True)) for key in keys}


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/benchmarks/loader.md."""
    heads = ["engine", *(head for head, _ in COLUMNS.values()), "ours / it, per CPU-second"]
    lines = [heads, ["---"] * len(heads)]
    for name, numbers in result["engines"].items():
        cells = [text(numbers[key]) for key, (_, text) in COLUMNS.items()]
        ratio = result["ratios"].get(name, {}).get("tokens_per_cpu_s")
        lines.append([f"`{name}`", *cells, f"{ratio:.2f}" if ratio else "–"])
    on, v = result["hardware"], result["versions"]
    about = (
        f"{on['cpu']}, {on['cores']} cores, {on['memory_gib']} GiB; load {result['load'][0]} before, "
        f"{result['load'][1]} after; {', '.join(f'{name} {number}' for name, number in v.items() if number)}. "
        f"{result['tokens']:,} tokens, {result['timed_tokens']:,} timed, medians of {result['rounds']} rounds."
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n{about}\n"


def main(args: list[str]) -> None:
    if args[:1] == ["--one"]:
        name, folder, first, steps, mark, peer = args[1:]
        with_peer(peer)
        print(json.dumps(measure(name, Path(folder), int(first), int(steps), int(mark))))
        return
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text().splitlines()[-1])), end="")
        return
    given = dict(arg.partition("=")[::2] for arg in args if arg != "json")
    if unknown := set(given) - set(SETTINGS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(SETTINGS)}= and json")
    quiet = "json" in args
    if "dir" in given:
        result = compare(given, Path(given["dir"]), quiet)
    else:
        with tempfile.TemporaryDirectory(prefix="loader-") as folder:
            result = compare(given, Path(folder), quiet)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The data order at scale, by simulation: 100,000 shards, 500 billion tokens, 1,024 ranks. No shard exists.

    python -m tests.benchmarks.scale [shards=100_000] [tokens=500_000_000_000] [ranks=1024] [seed=0]

Prints one JSON line:
    start_s, start_mib   from the start of a fresh interpreter to a rank's first windows (manifest read, order built;
                         no torch), and what is resident then at most; start_cpu_s is the part that the machine's other
                         work has no say in
    seek_s               one rank's windows of the step at 90 % of the epoch, asked first of a new order
    ranks_per_shard      how many ranks read a shard in an epoch, at most
    imbalance            bytes that a rank fetches in an epoch, its shards whole: the most over the mean
    fetched_over_stored  bytes that all ranks fetch in an epoch over those of all shards
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data_pipeline.manifest import MANIFEST, Manifest, ShardInfo, read_manifest, write_manifest
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from tests.benchmarks import machine

ROOT = Path(__file__).resolve().parents[2]
N_CTX, SEED = 1024, 1729
PER_LANE = 4  # windows of a step for each lane: 4M tokens a step on 1,024 lanes
LOOK_EVERY = 64  # turns of a rank
SETTINGS = {"shards": 100_000, "tokens": 500_000_000_000, "ranks": 1024, "seed": 0}


class Ranks:
    """The order as each of `ranks` ranks has it, one lane a rank."""

    def __init__(self, manifest: Manifest, ranks: int) -> None:
        self.ranks = ranks
        tokens = np.array([shard.tokens for shard in manifest.shards])
        self.shard_windows = np.maximum(tokens - 1, 0) // N_CTX
        self.plan = Plan({"all": tokens}, Ledger.start(PER_LANE * ranks, N_CTX, {"all": 1}), lanes=ranks, seed=SEED)

    def step(self, step: int, rank: int) -> np.ndarray:
        """The shards of a rank's windows of a step."""
        return self.plan.step(step, rank, self.ranks)[1].shard

    def shards_at(self, rank: int, turns: np.ndarray) -> np.ndarray:
        """The shards that a rank is in at these turns of the first epoch; turn n is position rank + n x lanes."""
        return self.plan.windows_at(rank + turns * self.ranks).shard


def write_source(folder: Path, shards: int, tokens: int, seed: int) -> None:
    """Shards of tokens / shards each, a tenth more or less, some far smaller: the last of each hundred is a rest."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(rng.normal(1, 0.1, shards), 0.7, 1.3)
    sizes[99::100] = rng.uniform(0.05, 1, len(sizes[99::100]))
    counts = (sizes * (tokens / sizes.sum())).astype(np.int64).tolist()
    infos = tuple(
        ShardInfo(f"{i:06d}.tar", int(2.09 * n), rng.bytes(32).hex(), n // 1074, n) for i, n in enumerate(counts)
    )
    write_manifest(Manifest(folder, "scale", "train", "uint16", 50257, 50256, "0" * 64, infos))


def start(folder: Path, ranks: int, rank: int, began: float) -> dict[str, float]:
    """What a rank does before its first batch, in this process, whose interpreter began at `began`."""
    Ranks(read_manifest(folder), ranks).step(0, rank)
    if "torch" in sys.modules:
        raise SystemExit("error: torch was imported")
    return {"s": time.monotonic() - began, "cpu_s": machine.cpu_seconds(), "mib": machine.resident_mib()[1]}


def starts(folder: Path, ranks: int) -> list[dict[str, float]]:
    found = []
    for rank in sorted({0, ranks // 2, ranks * 517 // 1024, ranks - 1}):
        argv = [sys.executable, "-m", "tests.benchmarks.scale", "--rank", folder, ranks, rank, time.monotonic()]
        run = subprocess.run([*map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(run.stdout))
    return found


def seeks(manifest: Manifest, ranks: int) -> list[float]:
    found = []
    for rank in range(0, ranks, max(1, ranks // 9)):
        new = Ranks(manifest, ranks)
        step = int(0.9 * new.shard_windows.sum()) // (PER_LANE * ranks)
        began = time.perf_counter()
        new.step(step, rank)
        found.append(time.perf_counter() - began)
    return found


def epoch(manifest: Manifest, ranks: int) -> dict[str, float]:
    """What the ranks fetch in the first epoch.

    A rank serves a shard on consecutive turns, so looking at it at its first turn, its last, and between at steps no
    longer than the smallest shard meets every shard that it reads.
    """
    whole = Ranks(manifest, ranks)
    windows = whole.shard_windows
    bytes_ = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)
    stride = min(LOOK_EVERY, int(windows[windows > 0].min()))
    readers, fetched = np.zeros(len(windows), dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    for rank in range(ranks):
        turns = len(range(rank, int(windows.sum()), ranks))
        shards = np.unique(whole.shards_at(rank, np.append(np.arange(0, turns, stride), turns - 1)))
        readers[shards] += 1
        fetched[rank] = bytes_[shards].sum()
    if not np.array_equal(readers > 0, windows > 0):
        raise SystemExit("error: a shard is read by no rank: the order is not what this benchmark takes it for")
    return {
        "ranks_per_shard": int(readers.max()),
        "imbalance": float(fetched.max() / fetched.mean()),
        "fetched_over_stored": float(fetched.sum() / bytes_.sum()),
    }


def simulate(folder: Path, given: dict[str, str]) -> dict[str, Any]:
    """Everything, as one JSON object."""
    shards, tokens, ranks, seed = (int(given.get(key, default)) for key, default in SETTINGS.items())
    write_source(folder, shards, tokens, seed)
    runs = starts(folder, ranks)
    manifest = read_manifest(folder)
    return {
        "benchmark": "scale",
        "shards": shards,
        "tokens": manifest.tokens,
        "ranks": ranks,
        "seed": seed,
        "hardware": machine.hardware(),
        "load": machine.load(),
        "versions": machine.versions("numpy"),
        "manifest_mb": (folder / MANIFEST).stat().st_size / 1e6,
        **{f"start_{key}": middle_and_most([run[key] for run in runs]) for key in runs[0]},
        "seek_s": middle_and_most(seeks(manifest, ranks)),
        **epoch(manifest, ranks),
    }


def middle_and_most(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "most": max(values)}


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/benchmarks/scale.md."""
    start, mib, seek = (result[key] for key in ("start_s", "start_mib", "seek_s"))
    rows = [
        ("from the interpreter's start to a rank's first windows", f"{start['median']:.2f} s", "3 s"),
        ("resident then, without torch", f"{mib['most']:.0f} MiB", "300 MB"),
        ("seek to 90 % of the epoch, median of ranks", f"{seek['median'] * 1e3:.1f} ms", "10 ms"),
        ("the same, most", f"{seek['most'] * 1e3:.1f} ms", ""),
        ("ranks that fetch a shard in an epoch, at most", f"{result['ranks_per_shard']}", "2"),
        ("bytes that a rank fetches in an epoch, most over mean", f"{result['imbalance']:.3f}", "stated"),
        ("bytes fetched over bytes stored", f"{result['fetched_over_stored']:.3f}", ""),
    ]
    lines = [("", "measured", "bar"), ("---", "---", "---"), *rows]
    on, v = result["hardware"], result["versions"]
    about = (
        f"{result['shards']:,} shards, {result['tokens']:,} tokens, {result['ranks']:,} ranks with a lane each, seed "
        f"{result['seed']}. {on['cpu']}, {on['cores']} cores, {on['memory_gib']} GiB; load {result['load']}; "
        f"{', '.join(f'{name} {number}' for name, number in v.items())}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{about}\n"


def main(args: list[str]) -> None:
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text().splitlines()[-1])), end="")
        return
    if args[:1] == ["--rank"]:
        print(json.dumps(start(Path(args[1]), int(args[2]), int(args[3]), float(args[4]))))
        return
    given = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(given) - set(SETTINGS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(SETTINGS)}=")
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        print(json.dumps(simulate(Path(folder), given)))


if __name__ == "__main__":
    main(sys.argv[1:])

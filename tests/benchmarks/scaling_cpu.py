"""Weak scaling on CPU: tokens a second of 1, 2 and 4 gloo ranks through the whole engine, over that of one rank.

    python -m tests.benchmarks.scaling_cpu json=true
    python -m tests.benchmarks.scaling_cpu ranks=1,2 steps=2 width=32 json=true

dp ranks add windows, each its own four; tp ranks share the same four and widen the model in proportion. `efficiency` is
the matrix products that a rank makes a second over those of the first row's. Ranks beyond the machine's cores share
them: their efficiency is at most cores / ranks, and `fair` gives it over that bound.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from tests.benchmarks.machine import hardware, load, versions
from tests.helpers.ranks import run_ranks

KNOWN = {"ranks": "1,2,4", "steps": "8", "width": "192", "rounds": "3", "json": "false"}


def arguments(words: list[str]) -> dict[str, str]:
    given = dict(word.partition("=")[::2] for word in words)
    if unknown := set(given) - set(KNOWN):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {', '.join(f'{k}={v}' for k, v in KNOWN.items())}")
    return KNOWN | given


def seconds(tp: int, width: int, steps: int, rounds: int) -> list[float]:
    """Of one step, a round each: two micro steps of two windows a rank, update included."""
    from tests.distributed import tiny_run as run

    with run.layout(tp=tp) as mesh:
        shape = {"n_layer": 4, "n_head": width * tp // 16, "n_embd": width * tp, "vocab_size": 512}
        cfg = run.config(tp=tp, sequence_parallel=tp > 1, micro_batch_size=2, model=shape)
        engine = run.build(cfg, mesh)
        batch = run.windows(mesh.dp_rank, 512, 4)
        batches = [type(batch)(batch.tokens[i : i + 2], batch.labels[i : i + 2]) for i in (0, 2)]

        def step() -> None:
            for b in batches:
                engine.backward(b, run.counts(60 * mesh.dp), last=b is batches[1])
            engine.step(1e-4)

        step()
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(steps):
                step()
            found.append((time.perf_counter() - began) / steps)
        return found


def row(ranks: int, tp: int, how: dict[str, str]) -> dict[str, Any]:
    sizes: dict[str, Any] = {key: int(how[key]) for key in ("width", "steps", "rounds")}
    slowest = max(
        statistics.median(s) for s in run_ranks(ranks, "tests.benchmarks.scaling_cpu:seconds", tp=tp, **sizes)
    )
    tokens = 4 * 16 * ranks // tp  # windows of 16 tokens
    layout = {"ranks": ranks, "dp": ranks // tp, "tp": tp}
    return {**layout, "step_s": round(slowest, 5), "tokens_per_s": tokens / slowest}


def flops(width: int) -> float:
    """Of a token's matrix products, up to a factor: 12 C² a layer and the head."""
    return 4 * 12 * width * width + 512 * width


def measure(how: dict[str, str]) -> dict[str, Any]:
    counts, width, cores = [int(n) for n in how["ranks"].split(",")], int(how["width"]), hardware()["cores"]
    layouts = [(n, 1) for n in counts] + [(n, n) for n in counts if n > 1]
    rows = [row(ranks, tp, how) for ranks, tp in layouts]
    for found in rows:
        work = found["tokens_per_s"] * flops(width * found["tp"]) / found["ranks"]
        found["efficiency"] = round(work / (rows[0]["tokens_per_s"] * flops(width) / rows[0]["ranks"]), 3)
        found["fair"] = round(found["efficiency"] / min(1.0, cores / found["ranks"]), 3)
        found["tokens_per_s"] = round(found["tokens_per_s"], 1)
    return {
        "benchmark": "scaling_cpu",
        "width": width,
        "rows": rows,
        "hardware": hardware(),
        "load": load(),
        "versions": versions("torch", "deepspeed", "megatron-core"),
    }


def main(words: list[str]) -> None:
    how = arguments(words)
    found = measure(how)
    if how["json"] == "true":
        print(json.dumps(found))
        return
    for r in found["rows"]:
        print("  ".join(f"{key} {value}" for key, value in r.items()))


if __name__ == "__main__":
    main(sys.argv[1:])

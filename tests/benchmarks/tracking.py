"""What tracking costs a training: step times without a server, with a healthy one and with one that hangs.

    python -m tests.benchmarks.tracking rounds=3 steps=600
    python -m tests.benchmarks.tracking --markdown docs/benchmarks/tracking.json

The real entry trains model=test on the CPU, in each round once with tracking=none, once with tracking=mlflow and a
server on this machine, and once with that server stopped (SIGSTOP) before the run, so that it takes connections and
never answers. The server runs on the last core, the training on the others: elsewhere it has a machine of its own. A
step is the time between two rows of the journal; the first third of a run is left out (MLflow's import takes seconds
once). Every logging call is timed on the training thread, the first ones too. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.machine import hardware, load, versions
from tests.helpers.ranks import ROOT, free_port, rank_env
from tests.system.runs import TINY, make_data
from tests.system.tracked import signal_group, start_server
from trainer.config.pretrain import PretrainConfig
from trainer.run.folder import RunFolder
from trainer.run.journal import read_rows

SETTINGS = {"rounds": 3, "steps": 600}
BAR, BAR_MS = 0.01, 5.0  # of a step's median; of the slowest logging call
MODES = ("none", "healthy", "stopped")


def child(path: str) -> None:
    """Stands in for `python -m trainer.pretrain`, with each logging call timed; the worst goes to the file `path`."""
    import trainer.tracking.tracker as tracking
    from conf.schema import run
    from trainer.pretrain import pretrain

    real, calls = tracking.Tracker.log, []

    def log(self: Any, step: int, metrics: Any, samples: Any = ()) -> None:
        start = time.perf_counter()
        real(self, step, metrics, samples)
        calls.append((time.perf_counter() - start) * 1e3)

    tracking.Tracker.log = log  # type: ignore[method-assign]
    run(PretrainConfig, pretrain)
    Path(path).write_text(json.dumps({"worst_ms": max(calls), "median_ms": median(calls), "calls": len(calls)}))


def train(folder: Path, data: Path, mode: str, steps: int, uri: str) -> dict[str, Any]:
    """One run: median and mean step in ms, and of its logging calls the slowest and the median."""
    shutil.rmtree(folder, ignore_errors=True)
    given = [*TINY, f"data.path={data}", f"run.dir={folder}/run", f"max_steps={steps}", "checkpoint.every_steps=0"]
    given += ["tracking=none"] if mode == "none" else ["tracking=mlflow", f"tracking.uri={uri}"]
    folder.mkdir()
    argv = [sys.executable, "-m", "tests.benchmarks.tracking", "--child", str(folder / "calls.json"), *given]
    env = {**rank_env(0, 1, free_port()), "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=900)
    rows = [row for row, _ in read_rows(RunFolder(folder / "run").metrics)]
    times = [row.time for row in rows if "train/loss" in row.metrics][steps // 3 :]
    return {
        "step_ms": 1e3 * median(b - a for a, b in pairwise(times)),
        "mean_ms": 1e3 * (times[-1] - times[0]) / (len(times) - 1),
        **json.loads((folder / "calls.json").read_text()),
    }


def measure(rounds: int, steps: int) -> dict[str, Any]:
    before, cores = load(), sorted(os.sched_getaffinity(0))
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as name:
        root, port = Path(name), free_port()
        data = make_data(root / "data")
        server = start_server(root, port)
        try:
            subprocess.run(["taskset", "-a", "-p", "-c", str(cores[-1]), str(server.pid)], stdout=subprocess.DEVNULL)
            os.sched_setaffinity(0, cores[:-1] or cores)
            for turn in range(rounds):
                for mode in MODES[turn % 3 :] + MODES[: turn % 3]:  # no mode always comes first
                    signal_group(server, signal.SIGSTOP if mode == "stopped" else signal.SIGCONT)
                    found[mode].append(train(root / "it", data, mode, steps, f"http://127.0.0.1:{port}"))
        finally:
            signal_group(server, signal.SIGKILL)
            os.sched_setaffinity(0, cores)
    step = {mode: median(run["step_ms"] for run in runs) for mode, runs in found.items()}
    tracked = [run for mode in MODES[1:] for run in found[mode]]
    return {
        "benchmark": "tracking",
        "rounds": rounds,
        "steps": steps,
        "step_ms": {mode: round(ms, 3) for mode, ms in step.items()},
        "spread_ms": {m: [round(f(r["step_ms"] for r in runs), 3) for f in (min, max)] for m, runs in found.items()},
        "mean_ms": {mode: round(median(run["mean_ms"] for run in runs), 3) for mode, runs in found.items()},
        "ratios": {mode: round(step[mode] / step["none"], 4) for mode in MODES[1:]},
        "log_worst_ms": round(max(run["worst_ms"] for run in tracked), 3),
        "log_median_ms": round(median(run["median_ms"] for run in tracked), 4),
        "log_calls": sum(run["calls"] for run in tracked),
        "hardware": hardware(),
        "load": [before, load()],
        "versions": versions("torch", "deepspeed", "mlflow"),
    }


def markdown(result: dict[str, Any]) -> str:
    spread = {mode: f"{low:.1f} to {high:.1f}" for mode, (low, high) in result["spread_ms"].items()}
    names = {"none": "tracking=none", "healthy": "a healthy server", "stopped": "a server that hangs"}
    rows = ["|  | median step, ms | of the rounds | mean | over tracking=none | bar |", f"|{' --- |' * 6}"]
    for mode in MODES:
        ratio = f"{result['ratios'][mode]:.3f}" if mode in result["ratios"] else ""
        rows.append(
            f"| {names[mode]} | {result['step_ms'][mode]:.2f} | {spread[mode]} | {result['mean_ms'][mode]:.2f} "
            f"| {ratio} | {f'{1 + BAR}' * bool(ratio)} |"
        )
    machine, packages = result["hardware"], result["versions"]
    return "\n".join(
        [
            *rows,
            "",
            f"Slowest of {result['log_calls']:,} logging calls on the training thread: {result['log_worst_ms']:.2f} ms "
            f"(bar: {BAR_MS:g} ms), the median {1e3 * result['log_median_ms']:.0f} µs.",
            "",
            f"{result['rounds']} rounds of {result['steps']} steps. {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB; load {result['load'][0]} before, {result['load'][1]} after; "
            + ", ".join(f"{k} {v}" for k, v in packages.items())
            + ".",
        ]
    )


def main(words: list[str]) -> None:
    if words[:1] == ["--child"]:
        path, sys.argv = words[1], [sys.argv[0], *words[2:]]
        return child(path)
    if words[:1] == ["--markdown"]:
        return print(markdown(json.loads(Path(words[1]).read_text())))
    given = dict(SETTINGS)
    for word in words:
        key, _, value = word.partition("=")
        if key not in given or not value.isdecimal() or int(value) < 1:
            raise SystemExit(f"{word}: give {', '.join(f'{k}={v}' for k, v in given.items())}")
        given[key] = int(value)
    print(json.dumps(measure(**given)))


if __name__ == "__main__":
    main(sys.argv[1:])

"""One data-parallel rank's loader, as a process of its own: each step's tokens and labels go to a file, until it ends.

`Ranks` starts such processes quickly: a server that has imported torch forks them.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np

from data_pipeline.manifest import read_manifest
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.stream.loader import TrainLoader
from data_pipeline.stream.windows import ShardStream


def open_loader(root: Path, ledger: Ledger, *, lanes: int, seed: int, rank: int, dp: int, step: int) -> TrainLoader:
    """A loader over all sources below `root`, made as the trainer makes it."""
    manifests = {path.name: read_manifest(path / "train") for path in root.iterdir()}
    plan = Plan({n: [s.tokens for s in m.shards] for n, m in manifests.items()}, ledger, lanes=lanes, seed=seed)
    stream = ShardStream([manifests[name] for name in plan.names], open_shards=lanes // dp * len(manifests))
    return TrainLoader(plan, stream, dp_rank=rank, dp=dp, micro_batch_size=2, step=step)


def serve(spec: str, out: str, rank: int, dp: int, step: int, steps: int) -> None:
    """Serve [step, steps), then wait to be killed."""
    told = json.loads(Path(spec).read_text())
    loader = open_loader(
        Path(told["root"]),
        Ledger.from_json(told["ledger"]),
        lanes=told["lanes"],
        seed=told["seed"],
        rank=rank,
        dp=dp,
        step=step,
    )
    folder = Path(out) / f"rank-{rank}"
    folder.mkdir(parents=True)
    for number in range(step, steps):
        batches = loader.next()
        both = [
            np.concatenate([b.tokens.numpy() for b in batches]),
            np.concatenate([b.labels.numpy() for b in batches]),
        ]
        aside = folder / "aside"
        aside.write_bytes(np.stack(both).tobytes())
        aside.replace(folder / f"step-{number}")
    time.sleep(3600)


class Ranks:
    """The ranks of one life of a run."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.stream_rank"])

    def __init__(self, spec: Path, out: Path, *, dp: int, step: int, steps: int) -> None:
        self.out, self.dp, self.step = out, dp, step
        self.processes = [
            self.context.Process(target=serve, args=(str(spec), str(out), rank, dp, step, steps), daemon=True)
            for rank in range(dp)
        ]
        for process in self.processes:
            process.start()

    def done(self, rank: int) -> int:
        """The first step that a rank has not served."""
        step = self.step
        while (self.out / f"rank-{rank}" / f"step-{step}").exists():
            step += 1
        return step

    def wait(self, rank: int, step: int, timeout_s: float = 60) -> None:
        """Until a rank has served the steps before `step`."""
        deadline = time.monotonic() + timeout_s
        while not (self.out / f"rank-{rank}" / f"step-{step - 1}").exists():
            assert all(p.is_alive() for p in self.processes), f"a rank ended: {[p.exitcode for p in self.processes]}"
            assert time.monotonic() < deadline, f"rank {rank} did not serve step {step - 1} in {timeout_s} s"
            time.sleep(0.001)

    def kill(self, rng: random.Random) -> int:
        """SIGKILL, in any order; returns the first step that not all have served."""
        for process in rng.sample(self.processes, self.dp):
            process.kill()
            time.sleep(rng.uniform(0, 0.002))
        for process in self.processes:
            process.join()
        return min(self.done(rank) for rank in range(self.dp))

"""Entry: `make demo`: raw text to a trained, killed, resumed, sampled and tracked model, in minutes on two CPU cores.

Every step is a command that a user would type. This file only types them, kills one rank half way, and adds up.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from data_pipeline.files import own_folder
from data_pipeline.manifest import decode_block, read_manifest
from trainer.run.folder import RunFolder
from trainer.run.journal import read_journal, read_rows

STEPS = 1000
ROOT = Path("runs/demo")
RUN = RunFolder(ROOT / "run")


def demo() -> dict[str, Any]:
    """Run the demo. Raises UserError if a step fails."""
    started = time.monotonic()
    own_folder(ROOT, "demo", "move them away")
    shutil.rmtree(ROOT)  # a demo starts from nothing
    own_folder(ROOT, "demo", "move them away")
    say("Raw text to shards: the English prose that this Python carries, a vocabulary of 2,048")
    run("data_pipeline.bpe", "train", "corpus=pydocs", "vocab_size=2048", f"output={ROOT}/tokenizer")
    shards = [f"tokenizer={ROOT}/tokenizer", f"output={ROOT}/data", "val_fraction=0.05", "shard_tokens=100000"]
    run("data_pipeline.shards", "write", "corpus=pydocs", *shards)
    run("data_pipeline.shards", "verify", f"path={ROOT}/data")
    ranks = min(2, len(list(Path("/dev").glob("nvidia[0-9]*"))) or 2)  # a GPU serves one rank
    say(f"Training on {ranks} ranks; half way, rank 0 is killed with SIGKILL")
    train(ranks)
    say("A sample, on one rank")
    prompt = ["prompt=The module", "max_new_tokens=60", "temperature=0.8", "top_k=40", "json=true"]
    sample = json.loads(run("trainer.generate", f"checkpoint={RUN.root}", *prompt, capture=True))["text"][0]
    print(sample)
    say(f"The run's curves: .venv/bin/mlflow ui --backend-store-uri sqlite:///{ROOT.resolve()}/mlflow.db")
    summary = results()
    if not summary["resumed_at"] or summary["final_val_loss"] > 0.8 * summary["unigram_entropy"]:
        raise UserError(f"the run did not resume, or did not learn: {json.dumps(summary)}")
    return {**summary, "sample": sample, "seconds": round(time.monotonic() - started, 1)}


def train(ranks: int) -> None:
    """Train under the supervisor, which restarts the run from its last checkpoint after the kill."""
    supervise = ["-m", "launch.supervise", f"run.dir={RUN.root}", "backoff_s=0.5", "--"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    pretrain = ["-m", "trainer.pretrain", "experiment=demo", "run.name=demo", f"run.dir={RUN.root}"]
    with subprocess.Popen(
        [sys.executable, *supervise, *torchrun, *pretrain, f"data.path={ROOT}/data", f"max_steps={STEPS}"],
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))},
    ) as process:
        killed = False
        while process.poll() is None:
            if not killed and steps_done() > STEPS // 2:
                start = max(RUN.generations.glob("[0-9]*"))
                os.kill(json.loads(start.read_text())["pid"], signal.SIGKILL)
                killed = True
                say("Rank 0 is killed")
            time.sleep(0.2)
    if process.returncode or not killed:
        raise UserError(
            f"the training ended with exit code {process.returncode}, rank 0 {'was' if killed else 'not'} killed"
        )


def steps_done() -> int:
    rows = read_journal(RUN.metrics) if RUN.metrics.exists() else []
    return rows[-1].step if rows else 0


def results() -> dict[str, Any]:
    """The run in numbers, read from its own files."""
    rows = read_journal(RUN.metrics)
    losses = [r.metrics["train/loss"] for r in rows if "train/loss" in r.metrics]
    val_losses = [r.metrics["val/loss"] for r in rows if "val/loss" in r.metrics]
    latest = RUN.latest()
    layout = RUN.state(latest)["layout"] if latest else {}
    return {
        "steps": rows[-1].step,
        "first_loss": round(losses[0], 4),
        "final_val_loss": round(val_losses[-1], 4),
        "unigram_entropy": round(unigram_entropy(ROOT / "data" / "train"), 4),
        "tokens_per_s": round(rows[-1].metrics["speed/tokens_per_s"]),
        "resumed_at": max(r.resumed_at or 0 for r, _ in read_rows(RUN.metrics)),
        "dp": layout["dp"],
        "tp": layout["tp"],
        "zero_stage": layout["zero_stage"],
        "mlflow_run_id": json.loads((RUN.root / "tracking.json").read_text())["run_id"],
    }


def unigram_entropy(source: Path) -> float:
    """Nats a token: the loss of a model that knows how often each token occurs, and nothing of what precedes it."""
    manifest = read_manifest(source)
    counts = np.zeros(manifest.vocab_size)
    for shard in manifest.shards:
        with tarfile.open(source / shard.name) as tar:
            for member in tar:
                if member.name.endswith(".npy") and (file := tar.extractfile(member)):
                    block = decode_block(file.read(), manifest.numpy_dtype)
                    counts += np.bincount(block, minlength=manifest.vocab_size)
    p = counts[counts > 0] / counts.sum()
    return -math.fsum(p * np.log(p))


def run(module: str, *args: str, capture: bool = False) -> str:
    """`python -m module args`; its output is shown, or returned. Raises UserError if it fails."""
    print(f"$ python -m {module} {' '.join(args)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *args], stdout=subprocess.PIPE if capture else None, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"python -m {module} ended with exit code {done.returncode}")
    return done.stdout or ""


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(f"{__doc__}\nIt takes no arguments, and starts by deleting {ROOT}.")
    try:
        print(json.dumps(demo()))
    except UserError as e:
        sys.exit(f"error: {e}")

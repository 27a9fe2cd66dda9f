"""How long a training step waits for its data, on the real entry: the share of the step, 0..1.

    python -m tests.benchmarks.loader_wait [model=gpt2_small] [steps=60] [tokens=20_000_000] [windows=64]
    python -m tests.benchmarks.loader_wait model=test steps=24 tokens=1_000_000 micro_batch_size=8 windows=8

The first on a GPU, the second on a CPU. Random tokens come in as nanoGPT's file, become shards and are trained on for
some steps of these many windows. One JSON line: the share in the last 20 steps, as the run itself logs it
(`speed/loader_wait`), and the tokens a second beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import documents, machine
from trainer.config.pretrain import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"model": "gpt2_small", "steps": "60", "tokens": "20_000_000", "micro_batch_size": "16", "windows": "64"}


def run(module: str, *args: str) -> None:
    subprocess.run([sys.executable, "-m", module, *args], cwd=ROOT, stdout=sys.stderr, check=True)


def measure(folder: Path, model: str, steps: str, tokens: str, micro_batch_size: str, windows: str) -> dict[str, Any]:
    import torch

    from conf.schema import load
    from trainer.run.journal import read_journal

    for split, count, seed in (("train", int(tokens), 0), ("val", 100_000, 1)):
        documents.prepare(folder / f"raw-{split}", "flat", count, seed)
        source = [f"input={folder}/raw-{split}/flat/train.bin", "tokenizer=gpt2", f"output={folder}/data"]
        run("data_pipeline.shards", "import", "format=nanogpt", f"split={split}", *source)
    n_ctx = load(PretrainConfig, [f"model={model}", "data.path=x", "max_steps=1"]).model.n_ctx
    given = [f"model={model}", f"model.vocab_size={documents.VOCAB}", f"data.path={folder}/data", "data.lanes=8"]
    given += [f"tokens_per_step={int(windows) * n_ctx}", f"micro_batch_size={micro_batch_size}", f"max_steps={steps}"]
    given += ["eval.every=0", "eval.windows=8", "checkpoint.every_steps=0", "tracking=none", f"run.dir={folder}/run"]
    given += ["optim.schedule.warmup=1"]
    run("trainer.pretrain", *given)
    rows = [row.metrics for row in read_journal(folder / "run" / "metrics.jsonl") if "train/loss" in row.metrics]
    gpu = torch.cuda.is_available()
    return {
        "benchmark": "loader_wait",
        "model": model,
        "steps": len(rows),
        "loader_wait": rows[-1]["speed/loader_wait"],
        "tokens_per_s": rows[-1]["speed/tokens_per_s"],
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "hardware": machine.hardware(),
        "load": machine.load(),
        "versions": machine.versions("torch", "deepspeed", "numpy"),
    }


def main(args: list[str]) -> None:
    given = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(given) - set(SETTINGS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(SETTINGS)}=")
    with tempfile.TemporaryDirectory(prefix="loader-wait-") as folder:
        print(json.dumps(measure(Path(folder), **(SETTINGS | given))))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a checkpoint costs the training: saved in the background, saved blocking, and by DeepSpeed and torch.save.

    python -m tests.benchmarks.checkpoint [model=gpt2_small] [rounds=3] [n_ctx=64] [dir=FOLDER] [json=true]
    python -m tests.benchmarks.checkpoint --markdown FILE.json

One rank (a GPU where there is one), fp32, ZeRO-1. A round saves one state in each way and trains on while the
background save is written; all writers fsync. Prints one JSON line, of medians over the rounds:
    blocking_s           the whole of a blocking save: written, hashed, safe on disk, published
    stall_s, stall_share what the training thread waits for a background save, and that over blocking_s of its round
    write_s              from then on until that checkpoint is published, with training beside it
    step_s, beside_s     a training step alone, and one while the background save is written
    deepspeed_s          engine.save_checkpoint and fsync of its files;  torch_save_s  torch.save of the same tensors
    load_s               load_weights and restore from a published checkpoint, every sha256 checked, pages cached
    bit_equal            whether the background save's files hold the bytes of the blocking one's
Without `json=true` each round is told on stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from conf.schema import load
from data_pipeline.stream.loader import Batch
from tests.benchmarks import machine
from tests.distributed.tiny_run import TinyEngine, counts
from trainer.checkpoint import load as checkpoint
from trainer.checkpoint.save import Saver
from trainer.checkpoint.write import Writer, run_facts
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.mesh import join_ranks
from trainer.distributed.world import read_world
from trainer.engine.fragments import owned
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.run.folder import RunFolder

SETTINGS = {"model": "gpt2_small", "rounds": "3", "n_ctx": "64", "dir": "", "json": ""}
BAR = 0.15  # of a blocking save
SECONDS = ("blocking_s", "stall_s", "write_s", "step_s", "beside_s", "deepspeed_s", "torch_save_s", "load_s")


def build(model: str, n_ctx: int) -> TinyEngine:
    """The model as the run's entry would build it, alone; the context is cut to `n_ctx`, for short steps."""
    given = [f"model={model}", f"model.n_ctx={n_ctx}", "data.path=x", "max_steps=1", "precision=fp32", "data.lanes=1"]
    given += [f"tokens_per_step={n_ctx}", "micro_batch_size=1", "checkpoint.keep=1", "tracking=none", "parallel=zero1"]
    cfg = load(PretrainConfig, given)
    mesh = join_ranks(read_world(), cfg.parallel)
    module = GPT(cfg.model, mesh, sequence_parallel=False).to(mesh.device)
    initialise(module, cfg.model, cfg.seed)
    return TinyEngine(module, cfg, mesh)


def train(engine: TinyEngine) -> float:
    """Seconds of one step on random tokens."""
    cfg, start = engine.cfg.model, time.perf_counter()
    ids = torch.randint(cfg.vocab_size, (1, cfg.n_ctx + 1))
    engine.backward(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), counts(cfg.n_ctx), last=True)
    engine.step(1e-4)
    settle()
    return time.perf_counter() - start


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def saver(engine: TinyEngine, folder: Path, background: bool, written: list[float]) -> Saver:
    run = RunFolder(folder)
    engine.cfg.checkpoint.background = background

    def note(path: Path, step: int, seconds: float) -> None:
        written.append(seconds)

    cfg, generation = engine.cfg, run.take_generation()
    facts = run_facts(cfg.optim, cfg.model, cfg.parallel, cfg.precision, engine.mesh)
    writer = Writer(cfg.model, engine.specs, cfg.checkpoint, engine.mesh, run, generation, "", facts, published=note)
    return Saver(engine, writer)


def timed(function: Callable[[], Any]) -> float:
    settle()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sync(folder: Path) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def torch_save(engine: TinyEngine, folder: Path) -> None:
    folder.mkdir()
    tensors = {f"{k}/{f.name}": v for f in owned(engine.module, engine.adam) for k, v in f.views.items()}
    torch.save({name: t.clone() for name, t in tensors.items()}, folder / "state.pt")  # clone: a view saves its flat
    sync(folder)


def deepspeed_save(engine: TinyEngine, folder: Path) -> None:
    zero = engine.deepspeed.optimizer
    zero.fp16_groups = zero.bf16_groups  # the name that its own save looks for in fp32
    with contextlib.redirect_stdout(sys.stderr):
        engine.deepspeed.save_checkpoint(str(folder), tag="it")
    sync(folder)


def once(
    engine: TinyEngine, folder: Path, savers: dict[bool, Saver], step: int, written: list[float]
) -> dict[str, Any]:
    """One state, saved in every way; the savers' folders keep their newest checkpoint."""
    blocking, background = savers[False], savers[True]
    found: dict[str, Any] = {"blocking_s": timed(lambda: blocking.save(step, {}))}
    for name, peer in (("torch_save_s", torch_save), ("deepspeed_s", deepspeed_save)):
        found[name] = timed(partial(peer, engine, folder / "peer"))
        shutil.rmtree(folder / "peer")
    found["stall_s"] = timed(lambda: background.save(step, {}))
    beside = []
    while background._thread.is_alive():
        beside.append(train(engine))
    background.wait()
    paths = [s.writer.run.checkpoint(step, s.writer.generation) for s in (blocking, background)]
    found |= {"write_s": written[-1], "beside_s": median(beside) if beside else None, "steps_beside": len(beside)}
    found["step_s"] = median(train(engine) for _ in range(3))
    found["bit_equal"] = same(*paths)
    found["bytes"] = sum(f.stat().st_size for f in paths[1].iterdir())

    def read() -> None:
        checkpoint.load_weights(paths[1], engine.module, engine.mesh)
        checkpoint.restore(paths[1], engine)
        settle()

    found["load_s"] = timed(read)
    return found


def same(a: Path, b: Path) -> bool:
    """Every file, byte for byte."""
    names = [sorted(f.name for f in folder.iterdir()) for folder in (a, b)]
    if names[0] != names[1] or len(names[0]) < 5:
        return False
    for name in names[0]:
        with (a / name).open("rb") as f, (b / name).open("rb") as g:
            while (x := f.read(1 << 24)) == (y := g.read(1 << 24)) and x:
                pass
            if x != y:
                return False
    return True


def measure(folder: Path, model: str, rounds: int, n_ctx: int, quiet: bool) -> dict[str, Any]:
    loads, written = [machine.load()], list[float]()
    engine = build(model, n_ctx)
    train(engine)  # moments that are not zero
    savers = {way: saver(engine, folder / str(way), way, written) for way in (False, True)}
    runs = []
    for step in range(1, rounds + 1):
        runs.append(once(engine, folder, savers, step, written))
        if not quiet:
            print(f"round {step} of {rounds}: {runs[-1]}", file=sys.stderr)
    seconds = {key: median([v for run in runs if (v := run[key]) is not None] or [0.0]) for key in SECONDS}
    gpu = torch.cuda.is_available()
    return {
        "benchmark": "checkpoint",
        "model": model,
        "n_ctx": n_ctx,
        "rounds": rounds,
        "bytes": runs[-1]["bytes"],
        **{key: round(value, 4) for key, value in seconds.items()},
        "stall_share": round(median(run["stall_s"] / run["blocking_s"] for run in runs), 4),
        "steps_beside": sum(run["steps_beside"] for run in runs),
        "blocking_gb_per_s": round(runs[-1]["bytes"] / seconds["blocking_s"] / 1e9, 3),
        "write_gb_per_s": round(runs[-1]["bytes"] / seconds["write_s"] / 1e9, 3),
        "ratios": {
            f"{way}_over_{peer}": round(median(run[f"{way}_s"] / run[f"{peer}_s"] for run in runs), 4)
            for way in ("blocking", "stall")
            for peer in ("deepspeed", "torch_save")
        },
        "bit_equal": all(run["bit_equal"] for run in runs),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "hardware": machine.hardware(),
        "load": [*loads, machine.load()],
        "versions": machine.versions("torch", "deepspeed", "safetensors"),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/benchmarks/checkpoint.md."""
    r, ratios = result, result["ratios"]
    rows = [
        ("blocking save", f"{r['blocking_s']:.2f} s, {r['blocking_gb_per_s']:.2f} GB/s", ""),
        ("training stall of a background save", f"{r['stall_s']:.2f} s", ""),
        ("that stall over a blocking save", f"{100 * r['stall_share']:.1f} %", f"{100 * BAR:.0f} %"),
        ("bytes equal to the blocking save's", "yes" if r["bit_equal"] else "**no**", "yes"),
        ("background write, with training beside it", f"{r['write_s']:.2f} s, {r['write_gb_per_s']:.2f} GB/s", ""),
        ("a step alone, and beside the write", f"{r['step_s']:.2f} s, {r['beside_s']:.2f} s", ""),
        ("blocking save over DeepSpeed's save_checkpoint", f"{ratios['blocking_over_deepspeed']:.2f}", ""),
        ("blocking save over torch.save", f"{ratios['blocking_over_torch_save']:.2f}", ""),
        ("stall over DeepSpeed's save_checkpoint", f"{ratios['stall_over_deepspeed']:.3f}", ""),
        ("load into a live engine, verified", f"{r['load_s']:.2f} s", ""),
    ]
    lines = [("", "measured", "bar"), ("---", "---", "---"), *rows]
    on, v = r["hardware"], r["versions"]
    about = (
        f"{r['model']}, {r['bytes'] / 1e9:.3f} GB, fp32, one rank on {r['device']}, medians of {r['rounds']} rounds. "
        f"{on['cpu']}, {on['cores']} cores ({r['threads']} threads), {on['memory_gib']} GiB; load {r['load'][0]} "
        f"before, {r['load'][1]} after; {', '.join(f'{name} {number}' for name, number in v.items())}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{about}\n"


def main(args: list[str]) -> None:
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text().splitlines()[-1])), end="")
        return
    given = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(given) - set(SETTINGS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(SETTINGS)}=")
    given = SETTINGS | given
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=given["dir"] or None) as folder:
        quiet = given["json"] == "true"
        print(json.dumps(measure(Path(folder), given["model"], int(given["rounds"]), int(given["n_ctx"]), quiet)))


if __name__ == "__main__":
    main(sys.argv[1:])

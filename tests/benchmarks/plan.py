"""The plan beside measurements: `python -m tests.benchmarks.plan json=true`, on a CPU, some minutes.

Speed: rows measured on one H100 SXM 80 GB on 2026-11-22 (torch 2.11, DeepSpeed 0.19.8), predicted anew here. Memory:
the real engine on this machine's CPU, every storage counted; with `memory=false` without. Seconds: the whole command,
its start included. `--markdown FILE` prints the tables of docs/benchmarks/plan_h100.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.schema import load
from data_pipeline.files import GIB
from launch.config import PlanConfig
from tests.benchmarks.machine import hardware, versions
from tests.benchmarks.machine import load as busy
from tests.distributed.trainer.plan.test_plan_bytes import FEW, MANY, MODEL, RUN, planned
from tests.helpers.ranks import run_ranks
from trainer.config.parallel import Offload, Recompute
from trainer.plan import speed
from trainer.plan.choose import reckon
from trainer.plan.hardware import GPUS
from trainer.plan.layout import Layout
from trainer.plan.memory import tensor_memory
from trainer.plan.network import Cluster
from trainer.plan.workload import Workload

# model, micro batch, tokens/s through DeepSpeed (stage 1, fp32 accumulation) and in a plain compiled loop; all cuDNN
MEASURED = [
    ("gpt2_small", 32, 485_000, 495_000, "held out"),
    ("gpt2_medium", 16, 173_000, 182_000, "sets the host's time for a tensor"),
    ("gpt2_xl", 8, 37_200, 40_900, "held out"),
]
# Bytes a parameter of a step of one micro step. A plain loop: gradients written 4, clipped 12, AdamW 28, weights cast
# both ways 8. DeepSpeed's own wrapper, which made the measured rows and which flat_zero1.py has since replaced:
# gradients written, copied, added 18, norm 4, clipping 8, AdamW 28, weights 6, zeros 4.
PLAIN_UPDATE, WRAPPER_UPDATE = 52, 68


def speed_rows() -> list[dict[str, Any]]:
    gpu = GPUS["h100_80gb"]
    found = []
    for name, micro, engine, plain, role in MEASURED:
        words = [f"model={name}", "data.tokens=1_000_000_000", f"tokens_per_step={micro * 1024}", "data.lanes=1"]
        cfg = load(PlanConfig, words)
        layout = Layout(1, 1, False, 1, Recompute.none, Offload.none, micro)
        row = reckon(Workload.of(cfg), layout, Cluster(1, 1, gpu, 400))
        p = row.memory.weights / 2
        rate = speed.HBM_SHARE * gpu.hbm_gb_s * 1e9
        loop = replace(row.step, host=0.0, optimizer=PLAIN_UPDATE * p / rate).total
        wrapper = replace(row.step, optimizer=WRAPPER_UPDATE * p / rate).total
        for through, used, measured, seconds in (
            ("DeepSpeed", role, engine, wrapper),
            ("a plain loop", "held out", plain, loop),
        ):
            predicted = cfg.tokens_per_step / seconds
            found.append(
                {
                    "model": name,
                    "micro_batch_size": micro,
                    "through": through,
                    "role": used,
                    "measured": measured,
                    "predicted": round(predicted),
                    "ratio": round(predicted / measured, 3),
                }
            )
    return found


def memory_rows() -> list[dict[str, Any]]:
    found = []
    cases: list[dict[str, Any]]
    for ranks, cases in ((1, [*FEW, *MANY]), (2, [*FEW, *MANY, {"zero": 1, "tp": 2, "micro": 16}])):
        measured = run_ranks(ranks, RUN, timeout_s=900, cases=[{**case, "model": MODEL} for case in cases])[0]
        for case, bytes_ in zip(cases, measured, strict=True):
            work, layout = planned(case, ranks)
            peak, total = max(bytes_[k] for k in ("forward", "backward", "step")), tensor_memory(work, layout).total
            found.append(
                {
                    "layout": str(layout),
                    "precision": work.precision.value,
                    "measured_mib": round(peak / 2**20, 2),
                    "predicted_mib": round(total / 2**20, 2),
                    "ratio": round(total / peak, 3),
                }
            )
    return found


def xl_at_8() -> dict[str, float]:
    """GiB of tensors of GPT-2 XL at micro batch 8: ours, and nanoGPT's by the same reckoning of its own recipe: fp32
    weights and moments 12 bytes a parameter and their bf16 copies 2 (gradients come when activations go), the residual
    stream in fp32, logits 6 bytes in the loss."""
    cfg = load(PlanConfig, ["model=gpt2_xl", "data.tokens=1_000_000_000", "tokens_per_step=8192", "data.lanes=1"])
    layout = Layout(1, 1, False, 1, Recompute.none, Offload.none, 8)
    ours = tensor_memory(Workload.of(cfg), layout)
    stream = 2 * 2 * 8192 * 1600 * 48  # two of a layer's tensors, 2 bytes more each
    peer = 14 * ours.weights / 2 + ours.activations + stream + 6 * 8192 * 50304
    full = {r.value: tensor_memory(Workload.of(cfg), replace(layout, recompute=r)).total / GIB for r in Recompute}
    return {"nanogpt": round(peer / GIB, 1), **{f"ours_{name}": round(size, 1) for name, size in full.items()}}


def command_seconds() -> dict[str, dict[str, float]]:
    """Best of three, from the start of Python to its end: on the clock, and of the processor, which other work on the
    machine does not count into."""
    found = {}
    for gpus, words in ((1, ["cluster.gpus_per_node=1"]), (8, []), (64, ["cluster.nodes=8"])):
        argv = [sys.executable, "-m", "launch.plan", "model=gpt2_xl", "data.tokens=9_000_000_000", *words]
        clock, processor = [], []
        for _ in range(3):
            started, before = time.perf_counter(), _children_s()
            subprocess.run(argv, check=True, capture_output=True)
            clock.append(time.perf_counter() - started)
            processor.append(_children_s() - before)
        found[str(gpus)] = {"wall": round(min(clock), 2), "cpu": round(min(processor), 2)}
    return found


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(memory: bool) -> dict[str, Any]:
    return {
        "benchmark": "plan",
        "hardware": hardware(),
        "load": busy(),
        "versions": versions("torch", "deepspeed", "hydra-core"),
        "command_s": command_seconds(),
        "speed": speed_rows(),
        "xl_at_8_gib": xl_at_8(),
        "memory": memory_rows() if memory else [],
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| model | micro batch | through | measured tokens/s | predicted | ratio | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['micro_batch_size']} | {r['through']} | {r['measured']:,} | {r['predicted']:,} | "
        f"{r['ratio']:.3f} | {r['role']} |"
        for r in result["speed"]
    ]
    lines += ["", "| layout | precision | counted MiB | predicted MiB | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['layout']} | {r['precision']} | {r['measured_mib']:.2f} | {r['predicted_mib']:.2f} | {r['ratio']:.3f} |"
        for r in result["memory"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--markdown"]:
        print(markdown(json.loads(Path(sys.argv[2]).read_text())))
    else:
        given = dict(word.split("=", 1) for word in sys.argv[1:])
        result = measure(given.get("memory", "true") == "true")
        print(json.dumps(result) if given.get("json") == "true" else markdown(result))

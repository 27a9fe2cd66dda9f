"""Training speed on one GPU: ours through DeepSpeed's engine beside a plain PyTorch loop with nanoGPT's recipe.

    python -m tests.benchmarks.train_speed [sizes=124M,355M,774M,1558M] [json=true] [--profile]

Prints one JSON line, without json=true a table too (stderr). Settings, as key=value or --key:
    sizes=         of SIZES; test is for a CPU; gpt3_xl and gpt3_xl_banded show the worth of banded attention
    sides=         of ours, fp8, plain (FlashAttention-2, as nanoGPT), plain_cudnn (ours,plain,plain_cudnn)
    fp8=true       sides=ours,fp8,plain
    micro_batch=   windows of a step (each size has its own)
    steps= warmup= timed steps of a round (10), steps before them (5); rounds= (3), the sides in turn in each
    recompute=     of ours: none, selective, full
    --cap-gib N    the allocator may hold N GiB; ours alone then trains with offload=cpu and recompute=full
    --profile      what the device did in three steps of ours, by kernel
    --fp8-equality 200 steps (equal_steps=) of bf16 and of fp8 from the same weights on the same batches: their losses

Each size is a fresh process, so that nothing is left of the one before; where the sides do not fit on the device
together (XL), each is one, and they cannot take turns. Compile caches are off: compile_s is the first step, cold.
Tokens are random, biases on, dropout 0, context n_ctx, one micro batch a step. Of each side:
    tokens_per_s, mfu   median of the rounds; MFU counts the model's FLOPs over the device's bf16 peak, also for fp8
    peak_gib            the most that this side's tensors held (on a CPU: null)
    compile_s           the first step, compiling included
    host_ms             a step's time until all is launched, less the wait for the gradient norm
    loss                of the last step: a number, so that a broken side shows
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import machine

ROOT = Path(__file__).resolve().parents[2]
GPT3_XL = {"n_layer": 24, "n_head": 16, "n_embd": 2048, "n_ctx": 2048}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {  # micro batch, and the model where it is not of n_ctx 1024
    "test": (2, {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_ctx": 32, "vocab_size": 300}),
    "124M": (32, {"n_layer": 12, "n_head": 12, "n_embd": 768}),
    "355M": (16, {"n_layer": 24, "n_head": 16, "n_embd": 1024}),
    "774M": (8, {"n_layer": 36, "n_head": 20, "n_embd": 1280}),
    "1558M": (8, {"n_layer": 48, "n_head": 25, "n_embd": 1600}),
    "gpt3_xl": (4, GPT3_XL),
    "gpt3_xl_banded": (4, {**GPT3_XL, "attention": "DB", "band": 256}),
}
SETTINGS = {
    "sizes": "124M,355M,774M,1558M",
    "sides": "ours,plain,plain_cudnn",
    "fp8": "false",
    "micro_batch": "0",
    "steps": "10",
    "warmup": "5",
    "rounds": "3",
    "recompute": "none",
    "cap_gib": "0",
    "profile": "false",
    "fp8_equality": "false",
    "equal_steps": "200",
    "json": "false",
}
SIDES = ("ours", "fp8", "plain", "plain_cudnn")
PACKAGES = ("torch", "triton", "deepspeed", "megatron-core")
SIDE_BYTES = 22  # for each parameter, of either side: weights, gradients, masters and moments
TOGETHER = 0.45  # of the device's memory, at most, for the sides to lie there together: the rest is activations'


class Side:
    """One way to train: `step` launches an update on a batch; `waited` counts its seconds of waiting for the device."""

    def __init__(self, step: Callable[[Any, Any], Any], micro_batch: int, n_ctx: int, vocab_size: int, device: Any):
        self.run, self.device, self.shape, self.vocab_size = step, device, (micro_batch, n_ctx), vocab_size
        self.waited = 0.0

    def step(self, seed: int) -> Any:
        import torch

        made = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocab_size, (self.shape[0], self.shape[1] + 1), generator=made)
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if self.device.type == "cuda":
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        return self.run(tokens, labels)


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def config_of(size: str, micro_batch: int, given: dict[str, str], fp8: bool) -> Any:
    """The run as a user would write it: ZeRO-1, bf16, compile=auto."""
    from data_pipeline.config import DataConfig, SourceConfig
    from trainer.config import pretrain as c
    from trainer.config.checkpoint import CheckpointConfig
    from trainer.config.model import ModelConfig
    from trainer.config.optim import OptimConfig, ScheduleConfig, ScheduleKind
    from trainer.config.parallel import Offload, ParallelConfig, Precision, Recompute
    from trainer.config.tracking import TrackerName, TrackingConfig
    from trainer.config.train import RunConfig

    shape = {"n_ctx": 1024, "vocab_size": 50257, **SIZES[size][1]}
    capped = float(given["cap_gib"]) > 0
    small: dict[str, Any] = {"recompute": Recompute.full, "offload": Offload.cpu} if capped else {}
    recompute = Recompute(given["recompute"])
    return c.PretrainConfig(
        run=RunConfig(name=size, dir="unused"),
        model=ModelConfig(name=size, **shape),
        optim=OptimConfig(name="gpt2", lr=3e-4, schedule=ScheduleConfig(ScheduleKind.constant)),
        data=DataConfig(name="random", path="unused", sources={"random": SourceConfig(".")}, lanes=micro_batch),
        parallel=ParallelConfig(**{"name": "zero1", "recompute": recompute, **small}),
        eval=c.EvalConfig(every=0),
        checkpoint=CheckpointConfig(every_steps=0),
        tracking=TrackingConfig(name=TrackerName.none),
        tokens_per_step=micro_batch * shape["n_ctx"],
        micro_batch_size=micro_batch,
        max_steps=10**6,
        precision=Precision.fp8 if fp8 else Precision.bf16,
    )


def ours(cfg: Any, mesh: Any) -> Side:
    """The model, prepared as a run prepares it, under our engine."""
    import torch

    from data_pipeline.stream.loader import Batch
    from trainer.engine.compile import prepare
    from trainer.engine.engine import Engine
    from trainer.model.gpt import GPT
    from trainer.objective.language_model import LanguageModel
    from trainer.plan.layout_rules import check_layout

    check_layout(cfg, 1)
    torch.manual_seed(1)
    model = GPT(cfg.model, mesh, recompute=cfg.parallel.recompute).to(mesh.device)
    with torch.no_grad():  # not `initialise`: its draws on the CPU take longer than all the steps
        for name, p in model.named_parameters():
            p.normal_(std=0.02) if p.ndim > 1 else p.fill_(float(name.endswith("weight")))
    prepare(model, cfg.precision, cfg.compile, cfg.parallel, mesh)
    engine = Engine(model, LanguageModel(), cfg.optim, cfg.parallel, cfg.precision, mesh)
    valid = torch.tensor(float(cfg.tokens_per_step), dtype=torch.float64, device=mesh.device)

    def step(tokens: Any, labels: Any) -> Any:
        loss = engine.backward(Batch(tokens, labels), valid[None], last=True)[0] / valid
        engine.step(cfg.optim.lr)
        return loss

    side = Side(step, cfg.micro_batch_size, cfg.model.n_ctx, cfg.model.vocab_size, mesh.device)
    norm = engine._grad_norm

    def timed() -> float:  # the one wait of a step
        since = time.perf_counter()
        found = norm()
        side.waited += time.perf_counter() - since
        return found

    engine._grad_norm = timed  # type: ignore[method-assign]
    return side


def plain(cfg: Any, mesh: Any, kernel: str) -> Side:
    import torch
    from torch.nn.attention import SDPBackend

    from tests.benchmarks.plain_gpt import PlainGPT, PlainTrainer

    m = cfg.model
    torch.manual_seed(1)
    with torch.device(mesh.device):
        model = PlainGPT(m.n_layer, m.n_head, m.n_embd, m.n_ctx, m.vocab_size, getattr(SDPBackend, kernel))
    trainer = PlainTrainer(model, mesh.device, compiled=mesh.device.type == "cuda")
    return Side(trainer.step, cfg.micro_batch_size, m.n_ctx, m.vocab_size, mesh.device)


def measure(size: str, names: list[str], given: dict[str, str]) -> dict[str, Any]:
    """All that is said of these sides of a size, in this process."""
    import torch

    from trainer.config.parallel import ParallelConfig
    from trainer.distributed.mesh import join_ranks
    from trainer.distributed.world import read_world
    from trainer.engine.compile import is_compiled
    from trainer.metrics import peak_flops
    from trainer.model.arithmetic import flops_per_token

    torch._inductor.config.force_disable_caches = True
    mesh = join_ranks(read_world(), ParallelConfig(name="one"))
    device, cap = mesh.device, float(given["cap_gib"])
    cuda = device.type == "cuda"
    if cap and cuda:
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(device).total_memory)
    micro_batch = int(given["micro_batch"]) or (1 if cap else SIZES[size][0])
    steps, warmup, rounds = (int(given[key]) for key in ("steps", "warmup", "rounds"))
    sides: dict[str, Side] = {}
    out: dict[str, dict[str, Any]] = {}
    for name in names:
        cfg = config_of(size, micro_batch, given, fp8=name == "fp8")
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        peer = {"plain": "FLASH_ATTENTION", "plain_cudnn": "CUDNN_ATTENTION"}.get(name)
        sides[name] = plain(cfg, mesh, peer) if peer else ours(cfg, mesh)
        since = time.perf_counter()
        sides[name].step(0)
        wait(device)
        out[name] = {
            "compile_s": time.perf_counter() - since,
            "compiled": cuda if peer else is_compiled(cfg.compile, cfg.parallel, mesh),
        }
        for seed in range(1, warmup):
            sides[name].step(seed)
        wait(device)
        out[name]["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    peak = peak_flops(device, torch.bfloat16)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for r in range(rounds):
        for name, side in sides.items():
            found[name].append(timed_round(side, range(1000 * r, 1000 * r + steps)))
    for name, side in sides.items():
        each = median(seconds for seconds, _ in found[name])
        tokens_per_s = micro_batch * cfg.model.n_ctx / each
        out[name] |= {"ms": 1e3 * each, "host_ms": 1e3 * median(host for _, host in found[name])}
        out[name] |= {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * flops_per_token(cfg.model) / peak}
        out[name]["loss"] = float(side.step(1))
    result: dict[str, Any] = {"micro_batch": micro_batch, "n_ctx": cfg.model.n_ctx, "sides": out}
    if given["profile"] == "true":
        result["profile"] = profile(sides[names[0]])
    return result | {"device": torch.cuda.get_device_name() if cuda else "cpu"}


def timed_round(side: Side, seeds: range) -> tuple[float, float]:
    """Seconds of a step, steps after one another; and of the host in it, each step started on an idle device."""
    wait(side.device)
    since = time.perf_counter()
    for seed in seeds:
        side.step(seed)
    wait(side.device)
    each = (time.perf_counter() - since) / len(seeds)
    host = []
    for seed in seeds[:3]:
        side.waited, since = 0.0, time.perf_counter()
        side.step(seed)
        host.append(time.perf_counter() - since - side.waited)
        wait(side.device)
    return each, median(host)


def profile(side: Side, steps: int = 3, rows: int = 15) -> list[dict[str, Any]]:
    """What took longest on the device, for a step: name, milliseconds, calls."""
    import torch

    kinds = [torch.profiler.ProfilerActivity.CPU]
    if side.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as trace:
        for seed in range(steps):
            side.step(seed)
        wait(side.device)
    key = "self_device_time_total" if side.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda e: -getattr(e, key))[:rows]
    return [{"name": e.key[:80], "ms": getattr(e, key) / 1e3 / steps, "calls": e.count / steps} for e in events]


def equality(size: str, given: dict[str, str]) -> dict[str, Any]:
    """Losses of bf16 and fp8 over equal steps: the same weights, the same batches, of text that can be learnt."""
    import torch

    from trainer.config.parallel import ParallelConfig
    from trainer.distributed.mesh import join_ranks
    from trainer.distributed.world import read_world

    mesh = join_ranks(read_world(), ParallelConfig(name="one"))
    losses: dict[str, list[float]] = {}
    for name in ("bf16", "fp8"):
        cfg = config_of(size, int(given["micro_batch"]) or SIZES[size][0], given, fp8=name == "fp8")
        side = ours(cfg, mesh)
        found = []
        for step in range(int(given["equal_steps"])):
            made = torch.Generator().manual_seed(step)  # frequent tokens, and a second half that repeats the first
            u = torch.rand(cfg.micro_batch_size, cfg.model.n_ctx // 2 + 1, generator=made)
            ids = (cfg.model.vocab_size * u**4).long()
            ids = torch.cat([ids, ids], 1)[:, : cfg.model.n_ctx + 1]
            found.append(side.run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        losses[name] = torch.stack(found).float().tolist()
        del side
        gc.collect()
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
    last = {name: sum(curve[-10:]) / len(curve[-10:]) for name, curve in losses.items()}
    worst = max(abs(a - b) / b for a, b in zip(losses["fp8"], losses["bf16"], strict=True))
    first = {name: curve[0] for name, curve in losses.items()}
    apart = abs(last["fp8"] - last["bf16"]) / last["bf16"]
    return {"first": first, "last": last, "last_apart": apart, "worst_apart": worst, "steps": len(losses["fp8"])}


def fresh(size: str, names: list[str], given: dict[str, str]) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tests.benchmarks.train_speed", "--one", size, ",".join(names), json.dumps(given)]
    ended = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:  # a size that does not fit, or a side that breaks, is a result too
        return {"failed": f"{','.join(names)} ended with {ended.returncode}: see stderr", "sides": {}}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def device_bytes() -> int | None:
    """Of the GPU, asked for in another process: this one is to hold nothing of it. None without one."""
    code = "import torch as t; print(t.cuda.get_device_properties(0).total_memory if t.cuda.is_available() else 0)"
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(ended.stdout) or None


def compare(given: dict[str, str]) -> dict[str, Any]:
    from trainer.model.arithmetic import param_count

    since, memory, sizes = time.perf_counter(), device_bytes(), {}
    names = "ours,fp8,plain" if given["fp8"] == "true" else given["sides"]
    names = "ours" if float(given["cap_gib"]) else names
    for size in given["sizes"].split(","):
        if given["fp8_equality"] == "true":
            sizes[size] = fresh(size, ["equality"], given)
            continue
        each = [name for name in names.split(",") if not name.startswith("plain") or "banded" not in size]
        n = param_count(config_of(size, 1, given | {"cap_gib": "0"}, fp8=False).model)
        together = memory is None or len(each) * SIDE_BYTES * n < TOGETHER * memory
        found: dict[str, Any] = {}
        for part in [each] if together else [[name] for name in each]:
            new = fresh(size, part, given)
            found = {**found, **new, "sides": {**found.get("sides", {}), **new["sides"]}}
        ends = found["sides"]
        pairs = [("ours", "plain"), ("ours", "plain_cudnn"), ("fp8", "ours"), ("fp8", "plain")]
        ratio = {f"{a}/{b}": ends[a]["tokens_per_s"] / ends[b]["tokens_per_s"] for a, b in pairs if {a, b} <= set(ends)}
        sizes[size] = found | {"parameters": n, "together": together, "ratios": ratio}
    both = [sizes.get(s, {}).get("sides", {}).get("ours") for s in ("gpt3_xl_banded", "gpt3_xl")]
    banded = {"banded/dense": both[0]["tokens_per_s"] / both[1]["tokens_per_s"]} if all(both) else {}
    return {
        "benchmark": "train_speed",
        "settings": {key: value for key, value in given.items() if key != "json"},
        "hardware": machine.hardware(),
        "load": machine.load(),
        "versions": machine.versions(*PACKAGES),
        "sizes": sizes,
        **banded,
        "seconds": time.perf_counter() - since,
    }


def markdown(result: dict[str, Any]) -> str:
    heads = ["size", "side", "ms/step", "tokens/s", "MFU", "peak GiB", "first step, s", "host ms", "ours / plain"]
    lines = [heads, ["---"] * len(heads)]
    for size, found in result["sizes"].items():
        for name, s in found.get("sides", {}).items():
            peak = "–" if s["peak_gib"] is None else f"{s['peak_gib']:.1f}"
            ratio = (
                f"{found['ratios']['ours/plain']:.2f}" if name == "ours" and "ours/plain" in found["ratios"] else "–"
            )
            cells = [size, name, f"{s['ms']:.1f}", f"{s['tokens_per_s']:,.0f}", f"{100 * s['mfu']:.1f}%", peak]
            lines.append([*cells, f"{s['compile_s']:.1f}", f"{s['host_ms']:.1f}", ratio])
    on, devices = result["hardware"], {found.get("device") for found in result["sizes"].values()}
    about = f"{', '.join(sorted(d for d in devices if d))}; {on['cpu']}, {on['cores']} cores; load {result['load']}; "
    about += ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n{about}.\n"


def settings(args: list[str]) -> dict[str, str]:
    """key=value, --key and --cap-gib VALUE, over the defaults."""
    found, args = dict(SETTINGS), list(args)
    while args:
        key, _, value = args.pop(0).removeprefix("--").partition("=")
        if not value:
            value = args.pop(0) if key.replace("-", "_") == "cap_gib" and args else "true"
        found[key.replace("-", "_")] = value
    wrong = [set(found) - set(SETTINGS)]
    wrong += [set(found[key].split(",")) - set(known) for key, known in (("sizes", SIZES), ("sides", SIDES))]
    if unknown := set().union(*wrong):
        raise SystemExit(
            f"error: {', '.join(sorted(unknown))}: settings are {', '.join(SETTINGS)}; "
            f"sizes {', '.join(SIZES)}; sides {', '.join(SIDES)}"
        )
    return found


def main(args: list[str]) -> None:
    if args[:1] == ["--one"]:
        size, names, given = args[1], args[2].split(","), json.loads(args[3])
        print(json.dumps(equality(size, given) if names == ["equality"] else measure(size, names, given)))
        return
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text().splitlines()[-1])), end="")
        return
    given = settings(args)
    result = compare(given)
    if given["json"] != "true" and given["fp8_equality"] != "true":
        print(markdown(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

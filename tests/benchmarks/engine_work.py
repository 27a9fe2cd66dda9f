"""What the engine adds to a step: operations, bytes and host seconds, beside a plain PyTorch loop in the same run.

    python -m tests.benchmarks.engine_work json=true

One rank, bf16, ZeRO-1, a model with GPT-2 XL's 580 parameter tensors but 32 channels, so that nothing but the number of
tensors matters: what is counted here a GPU's host has to launch, whatever the widths. The plain loop is nanoGPT's
recipe: fp32 weights, autocast, clip_grad_norm_, fused AdamW. Operations are counted by torch's dispatcher, views left
out; bytes are those of all tensors that the operations read and write, over the bytes of the weights in fp32.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

from tests.benchmarks.machine import hardware, load, versions
from tests.helpers.ranks import free_port, rank_env

PHASES = ("forward", "backward", "step")


def arguments(words: list[str]) -> dict[str, Any]:
    """key=value; layers, steps and micro_steps are numbers."""
    known: dict[str, Any] = {"layers": 48, "steps": 20, "micro_steps": 1, "json": False}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known:
            raise SystemExit(f"{word}: give {', '.join(f'{k}={v}' for k, v in known.items())}")
        known[key] = value == "true" if key == "json" else int(value)
    return known


class Phases:
    """Calls `phase(name, f)` run f; what is counted goes to the phase's name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in PHASES}

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        out = function()
        self.seconds[name].append(time.perf_counter() - began)
        return out


def our_step(engine: Any, batches: list[Any]) -> Callable[[Phases], None]:
    """Engine.backward is forward and backward in one: its forward is timed from inside."""
    from tests.distributed.tiny_run import counts

    def step(phase: Phases) -> None:
        for batch in batches:
            last = batch is batches[-1]
            phase("backward", partial(engine.backward, batch, counts(64), last=last))
        phase("step", lambda: engine.step(1e-4))

    forward = engine._sums
    engine._sums = lambda batch: engine.phase("forward", lambda: forward(batch))
    return step


def plain_step(model: Any, batches: list[Any]) -> Callable[[Phases], None]:
    import torch

    from trainer.objective.language_model import lm_loss

    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def forward(batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(lm_loss, *batch[:2]) / 64.0

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        adam.step()
        adam.zero_grad(set_to_none=True)

    def step(phase: Phases) -> None:
        for batch in batches:
            loss = phase("forward", partial(forward, batch))
            phase("backward", loss.backward)
        phase("step", update)

    return step


def counted(step: Callable[[Any], None], weights_bytes: int) -> dict[str, Any]:
    """Operations and bytes of one step by phase."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    ops: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    moved: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        phase = ""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = str(func).split(".")[1]
            if not func.is_view and name not in ("detach", "alias", "lift_fresh", "empty_like", "_unsafe_view"):
                ops[self.phase][name] += 1
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
                moved[self.phase] += sum(t.numel() * t.element_size() for t in tensors)
            return out

    with Count() as count:

        def phase(name: str, function: Callable[[], Any]) -> Any:
            outer, count.phase = count.phase, name
            out = function()
            count.phase = outer
            return out

        step(phase)
    return {
        "ops": {name: ops[name].total() for name in PHASES},
        "most": {name: dict(ops[name].most_common(4)) for name in PHASES},
        "passes": {name: round(moved[name] / weights_bytes, 2) for name in PHASES},
    }


def measure(step: Callable[[Any], None], weights_bytes: int, steps: int, use: Callable[[Any], None]) -> dict[str, Any]:
    warm = Phases()
    use(warm)
    for _ in range(3):
        step(warm)
    phases = Phases()
    use(phases)
    began = time.process_time()
    for _ in range(steps):
        step(phases)
    seconds = {name: sum(phases.seconds[name]) / steps for name in PHASES}
    out: dict[str, Any] = {"cpu_s": round((time.process_time() - began) / steps, 5), "s": seconds}

    def used(phase: Phases) -> None:
        use(phase)
        step(phase)

    return out | counted(used, weights_bytes)


def run(layers: int, steps: int, micro_steps: int) -> dict[str, Any]:
    os.environ.update(rank_env(0, 1, free_port()))
    import torch

    from tests.distributed import tiny_run
    from trainer.model.gpt import GPT
    from trainer.model.init import initialise

    shape = {"n_layer": layers, "n_head": 2, "n_embd": 32, "vocab_size": 256}
    with tiny_run.layout() as mesh:
        cfg = tiny_run.config(precision="bf16", model=shape)
        batch = tiny_run.windows(0, 256, 1)
        batches = [type(batch)(batch.tokens.clone(), batch.labels.clone()) for _ in range(micro_steps)]
        with redirect_stdout(StringIO()):
            engine = tiny_run.build(cfg, mesh)
        plain = GPT(cfg.model, mesh)
        initialise(plain, cfg.model, 7)
        weights_bytes = sum(p.numel() * 4 for p in plain.parameters())
        tensors = len(list(plain.parameters()))
        ours = measure(our_step(engine, batches), weights_bytes, steps, lambda p: setattr(engine, "phase", p))
        theirs = measure(plain_step(plain, batches), weights_bytes, steps, lambda _: None)
        ours["s"]["backward"] -= ours["s"]["forward"]  # the one runs inside of the other
    for found in (ours, theirs):
        found["s"] = {name: round(s, 5) for name, s in found["s"].items()}
    total = [sum(found[what].values()) for what in ("ops", "passes", "s") for found in (ours, theirs)]
    return {
        "benchmark": "engine_work",
        "parameters": tensors,
        "micro_steps": micro_steps,
        "ours": ours,
        "plain": theirs,
        "ratio": {
            "ops": round(total[0] / total[1], 2),
            "passes": round(total[2] / total[3], 2),
            "s": round(total[4] / total[5], 2),
        },
        "hardware": hardware(),
        "load": load(),
        "versions": versions("torch", "deepspeed"),
    } | {"threads": torch.get_num_threads()}


def main(words: list[str]) -> None:
    how = arguments(words)
    found = run(how["layers"], how["steps"], how["micro_steps"])
    if how["json"]:
        print(json.dumps(found))
        return
    for name in ("ours", "plain"):
        print(f"{name:6}", *(f"{what} {found[name][what]}" for what in ("ops", "passes", "s")))
    print("ours / plain", found["ratio"])


if __name__ == "__main__":
    main(sys.argv[1:])

"""CPU seconds of fp32 training on one rank, `make demo`'s path, beside a plain PyTorch loop with nanoGPT's recipe.

    python -m tests.benchmarks.fp32_speed [model=demo] [rounds=20] [steps=10] [micro_batch=4] [micro_steps=2]

Both sides start from the same weights and see the same random tokens, the plain one without DeepSpeed. They take turns
in each round. Prints one JSON line:
    ratio, ratio_upper_95   median over the rounds of ours / plain in CPU seconds, and its upper bound by the bootstrap
    cpu_ms                  of each side, the median CPU milliseconds of a step
    loss_apart              the largest difference of the two losses over all steps
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from tests.benchmarks import machine
from tests.helpers.ranks import free_port, rank_env

SETTINGS = {"model": "demo", "rounds": "20", "steps": "10", "micro_batch": "4", "micro_steps": "2"}
WARMUP = 5  # steps
LR = 3e-4
Step = Callable[[list[tuple[Any, Any]]], float]


def config(model: str, micro_batch: int, micro_steps: int) -> Any:
    from conf.schema import load
    from trainer.config.pretrain import PretrainConfig

    given = [f"model={model}", "data.path=x", "max_steps=1", "precision=fp32", f"data.lanes={micro_batch}"]
    given += [f"micro_batch_size={micro_batch}", "tracking=none", "parallel=zero1"]
    n_ctx = load(PretrainConfig, [*given, "tokens_per_step=1048576"]).model.n_ctx
    return load(PretrainConfig, [*given, f"tokens_per_step={micro_batch * micro_steps * n_ctx}"])


def ours(cfg: Any, mesh: Any) -> tuple[Step, Any]:
    """The engine's step, and its module as it was before the first."""
    import torch

    from data_pipeline.stream.loader import Batch
    from trainer.engine.engine import Engine
    from trainer.model.gpt import GPT
    from trainer.model.init import initialise
    from trainer.objective.language_model import LanguageModel

    model = GPT(cfg.model, mesh)
    initialise(model, cfg.model, cfg.seed)
    engine = Engine(model, LanguageModel(), cfg.optim, cfg.parallel, cfg.precision, mesh)
    counts = torch.tensor([float(cfg.tokens_per_step)], dtype=torch.float64)

    def step(batches: list[tuple[Any, Any]]) -> float:
        sums = [engine.backward(Batch(*b), counts, last=b is batches[-1]) for b in batches]
        engine.step(LR)
        return float(torch.stack(sums).sum() / counts)

    return step, engine.module


def plain(cfg: Any, module: Any) -> Step:
    """A loop over a `PlainGPT` with the same weights."""
    import torch
    from torch import nn

    from tests.benchmarks.plain_gpt import PlainGPT

    m = cfg.model
    model = PlainGPT(m.n_layer, m.n_head, m.n_embd, m.n_ctx, m.vocab_size, gelu="tanh")
    model.load_state_dict(plain_names(module, m.n_head))
    parameters = list(model.parameters())
    decay, other = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": cfg.optim.weight_decay}, {"params": other, "weight_decay": 0.0}]
    betas = (cfg.optim.beta1, cfg.optim.beta2)
    adam = torch.optim.AdamW(groups, lr=LR, betas=betas, eps=cfg.optim.eps, fused=True)

    def step(batches: list[tuple[Any, Any]]) -> float:
        losses = []
        for tokens, labels in batches:
            loss = model(tokens, labels) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(parameters, cfg.optim.grad_clip)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())

    return step


def plain_names(module: Any, n_head: int) -> dict[str, Any]:
    """The weights of a `GPT` on one rank as a `PlainGPT` names them; its queries, keys and values lie head by head."""
    import torch

    words = {"attn.c_attn": "qkv", "attn.c_proj": "out", "mlp.c_fc": "up", "mlp.c_proj": "down", "h.": "blocks."}
    found = {}
    for name, value in module.state_dict().items():
        if "c_attn" in name:
            value = torch.cat(list(value.unflatten(0, (n_head, 3, -1)).transpose(0, 1))).flatten(0, 1)
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        found[name] = value.clone()
    return found


def measure(given: dict[str, str]) -> dict[str, Any]:
    os.environ.update(rank_env(0, 1, free_port()))
    import torch

    from trainer.distributed.mesh import join_ranks
    from trainer.distributed.world import read_world

    torch.set_num_threads(1)  # CPU seconds of waiting threads are no work
    micro_batch, micro_steps, steps = (int(given[key]) for key in ("micro_batch", "micro_steps", "steps"))
    cfg = config(given["model"], micro_batch, micro_steps)
    mesh = join_ranks(read_world(), cfg.parallel)
    made = torch.Generator().manual_seed(1)

    def batch() -> tuple[Any, Any]:
        ids = torch.randint(cfg.model.vocab_size, (micro_batch, cfg.model.n_ctx + 1), generator=made)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    step, module = ours(cfg, mesh)
    sides = {"ours": step, "plain": plain(cfg, module)}
    apart, rounds, loads = 0.0, [], [machine.load()]
    for number in range(-1, int(given["rounds"])):
        batches = [[batch() for _ in range(micro_steps)] for _ in range(WARMUP if number < 0 else steps)]
        losses, seconds = {}, {}
        for name in sorted(sides, reverse=number % 2 == 0):
            began = time.process_time()
            losses[name] = [sides[name](b) for b in batches]
            seconds[name] = (time.process_time() - began) / len(batches)
        apart = max(apart, *(abs(a - b) for a, b in zip(losses["ours"], losses["plain"], strict=True)))
        if number >= 0:
            rounds.append(seconds)
    ratios = [found["ours"] / found["plain"] for found in rounds]
    draws = np.median(np.random.default_rng(1).choice(ratios, (10_000, len(ratios))), axis=1)
    return {
        "benchmark": "fp32_speed",
        "settings": given,
        "ratio": round(median(ratios), 4),
        "ratio_upper_95": round(float(np.quantile(draws, 0.975)), 4),
        "cpu_ms": {name: round(1e3 * median(found[name] for found in rounds), 3) for name in sides},
        "loss_apart": apart,
        "parameters": sum(p.numel() for p in module.parameters()),
        "hardware": machine.hardware(),
        "load": [*loads, machine.load()],
        "versions": machine.versions("torch", "deepspeed"),
    }


def main(args: list[str]) -> None:
    given = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(given) - set(SETTINGS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(SETTINGS)}=")
    found = measure(SETTINGS | given)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Attention, forward and backward: dense by each of torch's kernels, and the sparse patterns.

    python -m tests.benchmarks.attention [json=true] [contexts=1024,2048,4096] [tokens=16384] [rounds=20] [seed=0]
    python -m tests.benchmarks.attention --markdown FILE.json

Prints one JSON line; without json=true, what it does meanwhile goes to stderr. Random q, k and v, laid out as the model
does, in tokens / context rows. Medians of `rounds` after warm-up, on a GPU by CUDA events; `ratio` is the time of the
context's first row, the peer, over the row's own: more is faster. `visible` is the share of a causal square's pairs
that a pattern sees, `blocks` that of its 128 x 128 blocks that FlexAttention computes. `block` is one decoder block of
a model, dense against locally banded, forward and backward; on a GPU compiled, in bf16, of gpt3_xl.

On a GPU the kernels are FlashAttention-2's (the peer), cuDNN's and FlexAttention. Without one, the same script on small
shapes: torch's causal kernel (the peer) and the bias that a CPU takes for a pattern; there a pattern saves nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from conf.frozen import thaw
from conf.schema import CONF
from tests.benchmarks import machine
from trainer.config.attention import DENSE, Pattern
from trainer.config.model import ModelConfig
from trainer.model import flex
from trainer.model.mask import attention_bias, patterns

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
DEFAULTS = {
    "contexts": "1024,2048,4096" if GPU else "256,512",
    "tokens": 16384 if GPU else 512,
    "rounds": 20,
    "seed": 0,
}
HEADS, HEAD_DIM = (16, 128) if GPU else (2, 32)  # gpt3_xl's
NUMBERS: dict[str, Any] = (
    {"band": 256, "stride": 256, "summary": 32} if GPU else {"band": 32, "stride": 32, "summary": 4}
)
WARMUP = 5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def config(context: int) -> ModelConfig:
    """A model that has every kind."""
    return ModelConfig("b", 4, HEADS, HEADS * HEAD_DIM, context, 1, attention="DBSF", **NUMBERS)


def milliseconds(function: Callable[[], object], rounds: int) -> float:
    """Median over `rounds`, after warm-up and compilation."""
    for _ in range(WARMUP):
        function()
    taken = []
    for _ in range(rounds):
        if GPU:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - begun))
    return median(taken)


def both_ways(attend: Attend, context: int, rows: int) -> Callable[[], object]:
    """A forward and a backward of `attend`."""
    x = torch.randn(context, rows, HEADS, 3, HEAD_DIM, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(rows, HEADS, context, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    return lambda: torch.autograd.grad(attend(*x.permute(3, 1, 2, 0, 4).unbind()), x, dy)


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def kernels(context: int) -> dict[str, tuple[Pattern, Attend]]:
    """By name, the peer first."""
    found = patterns(config(context), context)
    if GPU:
        out: dict[str, tuple[Pattern, Attend]] = {
            "dense, FlashAttention-2": (DENSE, partial(dense, SDPBackend.FLASH_ATTENTION)),
            "dense, cuDNN": (DENSE, partial(dense, SDPBackend.CUDNN_ATTENTION)),
        }
        for kind, pattern in found.items():
            mask = flex.block_mask(pattern, context, DEVICE)
            out[f"{kind}, FlexAttention"] = (pattern, partial(flex.attend, mask=mask))
        return out
    out = {"dense, causal": (DENSE, partial(F.scaled_dot_product_attention, is_causal=True))}
    for kind, pattern in found.items():
        if pattern != DENSE:
            bias = attention_bias(context, context, torch.empty(()), None, pattern)
            out[f"{kind}, bias"] = (pattern, partial(F.scaled_dot_product_attention, attn_mask=bias))
    return out


def shares(pattern: Pattern, context: int) -> dict[str, float]:
    """What a pattern sees of the past, in pairs and in blocks."""
    side = -(-context // flex.BLOCK)
    mask = flex.block_mask(pattern, context, DEVICE)
    full = 0 if mask.full_kv_num_blocks is None else int(mask.full_kv_num_blocks.sum())
    blocks = full + int(mask.kv_num_blocks.sum())
    return {
        "visible": pattern.visible_pairs(context) / DENSE.visible_pairs(context),
        "blocks": blocks / (side * (side + 1) / 2),
    }


def compare(contexts: list[int], tokens: int, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each context and kernel."""
    out = []
    for context in contexts:
        rows, peer = max(1, tokens // context), 0.0
        for name, (pattern, attend) in kernels(context).items():
            try:
                ms = milliseconds(both_ways(attend, context, rows), rounds)
            except RuntimeError as e:  # a kernel that this GPU does not have
                say(f"{context} {name}: {e}")
                continue
            peer = peer or ms
            out.append({"context": context, "rows": rows, "kernel": name, "ms": ms, "ratio": peer / ms})
            out[-1] |= shares(pattern, context)
            say(str(out[-1]))
    return out


def block(rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """A decoder block of a GPT-3 model, dense and banded, and the mean of both: what a layer of "DB" takes."""
    from trainer.config.parallel import ParallelConfig
    from trainer.distributed.mesh import join_ranks, leave_ranks
    from trainer.distributed.world import read_world
    from trainer.model.attention import layer_masks
    from trainer.model.block import Block

    mesh = join_ranks(read_world(), ParallelConfig(name="benchmark"))
    cfg, rows = thaw(CONF / "model/gpt3_xl.yaml", ModelConfig), 8
    if not GPU:
        cfg, rows = replace(cfg, name="small", n_embd=64, n_head=2, n_ctx=256, band=32), 2
    x = torch.randn(cfg.n_ctx, rows, cfg.n_embd, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dy = torch.randn_like(x)
    masks = layer_masks(cfg, cfg.n_ctx, cfg.n_ctx, x)
    layer = Block(cfg, 0, mesh, False).to(DEVICE, DTYPE)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    inputs = [x, *layer.parameters()]
    run = torch.compile(layer, fullgraph=True, dynamic=False) if GPU else layer

    def gradients(kind: str) -> Any:
        return torch.autograd.grad(run(x, masks[kind]), inputs, dy)

    out: dict[str, Any] = {"model": cfg.name, "context": cfg.n_ctx, "rows": rows, "band": cfg.band}
    for kind, name in (("D", "dense_ms"), ("B", "banded_ms")):
        out[name] = milliseconds(partial(gradients, kind), rounds)
    out["ratio"] = out["dense_ms"] / out["banded_ms"]
    out["ratio_DB"] = 2 * out["dense_ms"] / (out["dense_ms"] + out["banded_ms"])
    say(str(out))
    leave_ranks(mesh)
    return out


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/benchmarks/attention.md."""
    heads = ["context", "attention", "ms", "peer / it", "pairs seen", "blocks"]
    lines = [heads, ["---"] * len(heads)]
    for row in result["attention"]:
        cells = [f"{row['ms']:.2f}", f"{row['ratio']:.2f}", f"{row['visible']:.0%}", f"{row['blocks']:.0%}"]
        lines.append([str(row["context"]), row["kernel"], *cells])
    b, on, v = result["block"], result["hardware"], result["versions"]
    about = (
        f"One block of {b['model']} at context {b['context']}, {b['rows']} rows: dense {b['dense_ms']:.2f} ms, a band "
        f"of {b['band']} {b['banded_ms']:.2f} ms, {b['ratio']:.2f} times as fast; in turn (DB) {b['ratio_DB']:.2f} "
        f"times as fast as all dense.\n\n{result['device']} in {result['dtype']}; {on['cpu']}, {on['cores']} cores; "
        f"load {result['load'][0]} before, {result['load'][1]} after; "
        f"{', '.join(f'{name} {number}' for name, number in v.items() if number)}. {result['rounds']} rounds."
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n{about}\n"


def main(args: list[str]) -> None:
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text().splitlines()[-1])), end="")
        return
    given = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(given) - {*DEFAULTS, "json"}:
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(DEFAULTS)}= and json=true")
    quiet = given.pop("json", "false") != "false"
    settings: dict[str, Any] = {**DEFAULTS, **given}
    contexts = [int(n) for n in str(settings["contexts"]).split(",")]
    tokens, rounds, seed = (int(settings[key]) for key in ("tokens", "rounds", "seed"))
    torch.manual_seed(seed)

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    before = machine.load()
    result = {
        "benchmark": "attention",
        "device": torch.cuda.get_device_name(DEVICE) if GPU else "CPU",
        "dtype": str(DTYPE).removeprefix("torch."),
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        **NUMBERS,
        "tokens": tokens,
        "rounds": rounds,
        "seed": seed,
        "hardware": machine.hardware(),
        "versions": machine.versions("torch", "triton"),
        "attention": compare(contexts, tokens, rounds, say),
        "block": block(rounds, say),
        "load": [before, machine.load()],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Sampling: 32 prompts of 32 lengths beside 32 of the longest length, and one draw of a token from logits.

    python -m tests.benchmarks.sampling [model=gpt2_small] [prompts=32] [longest=96] [new=16] [rounds=3] [seed=0]
    python -m tests.benchmarks.sampling --markdown FILE.json

Prints one JSON line. `texts`: seconds of the CPU (with a GPU: of the clock) that `sample` takes for the same number of
new tokens, medians of `rounds`, in turn; `ratio` is a row's seconds over those of `one length`. `one by one` is a batch
for each prompt, what prompts of different lengths took before they had one cache. `draws`: milliseconds of the clock
for one token of each of 16 rows of 50,257 logits, the least of 5 x `rounds`; `full sort` is the definition by a stable
sort of the whole vocabulary in fp64, which every draw did before. Random weights, prompts and logits.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from conf.frozen import thaw
from conf.schema import CONF
from tests.benchmarks import machine
from trainer.config.model import ModelConfig
from trainer.distributed.mesh import single_rank_mesh
from trainer.distributed.world import read_world
from trainer.inference.requests import Sampling
from trainer.inference.sampler import draw, sample
from trainer.model.gpt import GPT
from trainer.model.init import initialise

GPU = torch.cuda.is_available()
DEFAULTS: dict[str, Any] = {"model": "gpt2_small", "prompts": 32, "longest": 96, "new": 16, "rounds": 3, "seed": 0}
VOCABULARY, ROWS = 50257, 16


def texts(settings: dict[str, Any]) -> list[dict[str, Any]]:
    n, longest, new = settings["prompts"], settings["longest"], settings["new"]
    cfg = thaw(CONF / f"model/{settings['model']}.yaml", ModelConfig)
    mesh = single_rank_mesh(read_world())
    model = GPT(cfg, mesh).to(mesh.device)
    initialise(model, cfg, settings["seed"])
    every = torch.randint(cfg.vocab_size, (n, longest)).tolist()
    ragged = [ids[: max(1, longest * (i + 1) // n)] for i, ids in enumerate(every)]

    def run(prompts: list[list[int]], batch_size: int) -> float:
        begin = seconds()
        sample(model, prompts, Sampling(), max_new_tokens=new, seed=settings["seed"], batch_size=batch_size)
        return seconds() - begin

    ways = {
        "one length": partial(run, every, n),
        f"{len({len(ids) for ids in ragged})} lengths": partial(run, ragged, n),
        "one by one": partial(run, ragged, 1),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings["rounds"]):
        for name, way in ways.items():
            took[name].append(way())
    base = median(took["one length"])
    return [{"prompts": name, "seconds": median(s), "ratio": median(s) / base} for name, s in took.items()]


def seconds() -> float:
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def full_sort(logits_BV: Tensor, u_B: Tensor) -> Tensor:
    p_BV, id_BV = logits_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass_BV = p_BV.cumsum(-1)
    return id_BV.gather(-1, (mass_BV <= u_B[:, None] * mass_BV[:, -1:]).sum(-1, keepdim=True)).squeeze(-1)


def draws(rounds: int) -> list[dict[str, Any]]:
    device = torch.device("cuda" if GPU else "cpu")
    logits_BV, u_B = torch.randn(ROWS, VOCABULARY, device=device) * 3, torch.rand(ROWS, dtype=torch.float64).to(device)
    ways: dict[str, Callable[[], Tensor]] = {
        "full sort": lambda: full_sort(logits_BV, u_B),
        "torch.multinomial": lambda: logits_BV.softmax(-1).multinomial(1),
        "temperature alone": lambda: draw(Sampling(), logits_BV, u_B),
        "top_k=50": lambda: draw(Sampling(top_k=50), logits_BV, u_B),
        "top_p=0.9": lambda: draw(Sampling(top_p=0.9), logits_BV, u_B),
        "greedy": lambda: draw(Sampling(0.0), logits_BV, u_B),
    }
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(5 * rounds):
        for name, way in ways.items():
            begin = _now()
            way()
            least[name] = min(least[name], 1e3 * (_now() - begin))
    return [{"draw": name, "ms": ms, "ratio": least["full sort"] / ms} for name, ms in least.items()]


def _now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/benchmarks/sampling.md."""
    lines = ["| prompts | seconds | over one length |", "| --- | --- | --- |"]
    lines += [f"| {row['prompts']} | {row['seconds']:.2f} | {row['ratio']:.2f} |" for row in result["texts"]]
    lines += ["", "| draw | ms | full sort / it |", "| --- | --- | --- |"]
    lines += [f"| {row['draw']} | {row['ms']:.2f} | {row['ratio']:.1f} |" for row in result["draws"]]
    on, v = result["hardware"], result["versions"]
    about = (
        f"{result['model']}, {result['prompts']} prompts of up to {result['longest']} tokens, {result['new']} new "
        f"tokens each. {result['device']}; {on['cpu']}, {on['cores']} cores, {result['threads']} threads; load "
        f"{result['load'][0]} before, {result['load'][1]} after; "
        f"{', '.join(f'{name} {number}' for name, number in v.items() if number)}. {result['rounds']} rounds."
    )
    return "\n".join(lines) + f"\n\n{about}\n"


def main(args: list[str]) -> None:
    if args[:1] == ["--markdown"]:
        print(markdown(json.loads(Path(args[1]).read_text().splitlines()[-1])), end="")
        return
    given = dict(arg.partition("=")[::2] for arg in args)
    if unknown := set(given) - set(DEFAULTS):
        raise SystemExit(f"error: {', '.join(unknown)}: settings are {'=, '.join(DEFAULTS)}=")
    settings = {key: type(value)(given.get(key, value)) for key, value in DEFAULTS.items()}
    torch.manual_seed(settings["seed"])
    before = machine.load()
    result = {
        "benchmark": "sampling",
        **settings,
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "threads": torch.get_num_threads(),
        "hardware": machine.hardware(),
        "versions": machine.versions("torch"),
        "draws": draws(settings["rounds"]),
        "texts": texts(settings),
        "load": [before, machine.load()],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])

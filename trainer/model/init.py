"""GPT-2's initialisation (papers.md 2.2): every parameter a pure function of (seed, name), whatever the layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config.model import ModelConfig, Norm
from trainer.distributed.seeds import stable_seed
from trainer.model.gpt import GPT
from trainer.model.specs import to_local


@torch.no_grad()
def initialise(model: GPT, cfg: ModelConfig, seed: int) -> None:
    """Fill a model's parameters; each is drawn on the CPU in its true global shape, padded with zeros, then sliced."""
    layout = model.specs()
    stds = {f"{name}.weight": module.std for name, module in model.named_modules() if hasattr(module, "std")}
    for name, p in model.named_parameters():
        std = stds.get(name, _std(name, cfg))
        p.copy_(to_local(_draw(name, layout[name].shape, std, seed), layout[name], model.mesh.tp_rank, model.mesh.tp))


def _std(name: str, cfg: ModelConfig) -> float:
    """The standard deviation init_std; pre-norm divides that of what feeds the residual stream by sqrt(2 n_layer)."""
    if cfg.norm is Norm.pre and name.endswith("c_proj.weight"):
        return cfg.init_std / math.sqrt(2 * cfg.n_layer)
    return cfg.init_std


def _draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Biases 0, gains 1, weights N(0, std); a head's module may have a `std` of its own."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    generator = torch.Generator().manual_seed(stable_seed("init", seed, name))
    return torch.randn(shape, generator=generator).mul_(std)

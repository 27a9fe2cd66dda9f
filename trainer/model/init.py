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
    for name, p in model.named_parameters():
        p.copy_(to_local(_draw(name, layout[name].shape, cfg, seed), layout[name], model.mesh.tp_rank, model.mesh.tp))


def _draw(name: str, shape: tuple[int, ...], cfg: ModelConfig, seed: int) -> Tensor:
    """Biases 0, gains 1, weights N(0, init_std); pre-norm divides what feeds the residual stream by sqrt(2 n_layer)."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    std = cfg.init_std
    if cfg.norm is Norm.pre and name.endswith("c_proj.weight"):
        std /= math.sqrt(2 * cfg.n_layer)
    generator = torch.Generator().manual_seed(stable_seed("init", seed, name))
    return torch.randn(shape, generator=generator).mul_(std)

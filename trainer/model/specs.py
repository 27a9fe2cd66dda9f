"""Layout of each parameter: its true global shape, its padded one, and the dimension that tensor parallelism splits.

All padding is at the end of the split dimension: whole heads of `c_attn` and `c_proj`, rows of `wte`. What is saved
has the true shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.model import ModelConfig, Norm
from trainer.model.arithmetic import padded_n_head, padded_vocab_size


@dataclass(frozen=True)
class ParamSpec:
    """One parameter over all ranks; `tp_dim` None: every tp rank holds all of it.

    Raises:
        ValueError: padding outside the split dimension, or shapes that no parameter has; an index may say anything.
    """

    shape: tuple[int, ...]
    padded: tuple[int, ...]
    tp_dim: int | None

    def __post_init__(self) -> None:
        dims = range(len(self.shape))
        more = {d for d in dims if self.padded[d : d + 1] != self.shape[d : d + 1]}
        fits = len(self.padded) == len(dims) and all(0 < n <= m for n, m in zip(self.shape, self.padded, strict=True))
        if len(dims) not in (1, 2) or not fits or not more <= {self.tp_dim} or self.tp_dim not in (None, *dims):
            raise ValueError(f"a parameter of shape {self.shape}, padded {self.padded}, split along {self.tp_dim}")

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """The shape that each of `tp` ranks holds, padding included."""
        return tuple(n // tp if d == self.tp_dim else n for d, n in enumerate(self.padded))


def specs(cfg: ModelConfig, tp: int) -> dict[str, ParamSpec]:
    """Every parameter by name, in the model's order."""
    c, heads = cfg.n_embd, padded_n_head(cfg.n_head, tp) * cfg.head_dim
    out = {
        "wte.weight": ParamSpec((cfg.vocab_size, c), (padded_vocab_size(cfg.vocab_size, tp), c), 0),
        "wpe.weight": _whole(cfg.n_ctx, c),
    }
    block = {
        **_norm("ln_1", c),
        "attn.c_attn.weight": ParamSpec((3 * c, c), (3 * heads, c), 0),
        "attn.c_attn.bias": ParamSpec((3 * c,), (3 * heads,), 0),
        "attn.c_proj.weight": ParamSpec((c, c), (c, heads), 1),
        "attn.c_proj.bias": _whole(c),
        **_norm("ln_2", c),
        "mlp.c_fc.weight": ParamSpec((4 * c, c), (4 * c, c), 0),
        "mlp.c_fc.bias": ParamSpec((4 * c,), (4 * c,), 0),
        "mlp.c_proj.weight": ParamSpec((c, 4 * c), (c, 4 * c), 1),
        "mlp.c_proj.bias": _whole(c),
    }
    for layer in range(cfg.n_layer):
        out |= {f"h.{layer}.{name}": spec for name, spec in block.items()}
    return out | (_norm("ln_f", c) if cfg.norm is Norm.pre else {})


def _whole(*shape: int) -> ParamSpec:
    return ParamSpec(shape, shape, None)


def _norm(name: str, c: int) -> dict[str, ParamSpec]:
    return {f"{name}.weight": _whole(c), f"{name}.bias": _whole(c)}


def to_local(full: Tensor, spec: ParamSpec, tp_rank: int, tp: int) -> Tensor:
    """The slice that rank `tp_rank` of `tp` holds of a parameter of true shape, with zeros as padding."""
    if spec.tp_dim is None:
        return full
    size = spec.padded[spec.tp_dim] // tp
    start = min(tp_rank * size, spec.shape[spec.tp_dim])
    part = full.narrow(spec.tp_dim, start, min(size, spec.shape[spec.tp_dim] - start))
    missing = size - part.shape[spec.tp_dim]
    if not missing:
        return part.contiguous()
    pad = part.new_zeros([missing if d == spec.tp_dim else n for d, n in enumerate(part.shape)])
    return torch.cat([part, pad], spec.tp_dim)


def from_local(parts: Sequence[Tensor], spec: ParamSpec) -> Tensor:
    """The parameter in its true shape from what the tp ranks hold, in rank order."""
    if spec.tp_dim is None:
        return parts[0]
    return torch.cat(list(parts), spec.tp_dim).narrow(spec.tp_dim, 0, spec.shape[spec.tp_dim]).contiguous()

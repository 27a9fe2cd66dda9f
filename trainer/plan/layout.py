"""One way to spread a run over its ranks, and the parameters that each rank then holds. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trainer.config.model import ModelConfig, Norm
from trainer.config.parallel import Offload, ParallelConfig, Recompute
from trainer.model.arithmetic import padded_n_head, padded_vocab_size


@dataclass(frozen=True)
class Layout:
    """A choice for everything that `parallel` and `micro_batch_size` may leave open."""

    dp: int
    tp: int
    sequence_parallel: bool
    zero_stage: int
    recompute: Recompute
    offload: Offload
    micro_batch_size: int

    @classmethod
    def of(cls, parallel: ParallelConfig, micro_batch_size: int, world_size: int) -> Layout:
        """The layout of settings that leave nothing open."""
        p, dp = parallel, world_size // parallel.tp
        return cls(dp, p.tp, p.sequence_parallel, p.zero_stage, p.recompute, p.offload, micro_batch_size)

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    def settings(self, parallel: ParallelConfig) -> dict[str, Any]:
        """The fields of a root config with this layout in place of what `parallel` leaves open."""
        chosen = replace(
            parallel,
            tp=self.tp,
            sequence_parallel=self.sequence_parallel,
            zero_stage=self.zero_stage,
            recompute=self.recompute,
            offload=self.offload,
        )
        return {"parallel": chosen, "micro_batch_size": self.micro_batch_size}

    def __str__(self) -> str:
        offload = " offload=cpu" if self.offload is Offload.cpu else ""
        return (
            f"dp={self.dp} tp={self.tp} ZeRO-{self.zero_stage} recompute={self.recompute.value}{offload} "
            f"micro_batch_size={self.micro_batch_size}"
        )


def local_heads(model: ModelConfig, tp: int) -> int:
    """Attention heads on one of `tp` ranks, padding included."""
    return padded_n_head(model.n_head, tp) // tp


def local_vocab(model: ModelConfig, tp: int) -> int:
    """Rows of the vocabulary on one of `tp` ranks, padding included."""
    return padded_vocab_size(model.vocab_size, tp) // tp


def local_params(model: ModelConfig, tp: int) -> int:
    """Parameters on one of `tp` ranks before ZeRO, padding included; equal on all of them (trainer/model/specs.py)."""
    c, heads = model.n_embd, local_heads(model, tp) * model.head_dim
    inner = 4 * c // tp
    block = 4 * c + (3 * heads * c + 3 * heads) + (heads * c + c) + (inner * c + inner) + (inner * c + c)
    last = 2 * c if model.norm is Norm.pre else 0
    return (local_vocab(model, tp) + model.n_ctx) * c + model.n_layer * block + last


def tensors(model: ModelConfig) -> int:
    """Number of parameter tensors: the cost of DeepSpeed's hooks, copies and norms grows with it."""
    return 2 + 12 * model.n_layer + (2 if model.norm is Norm.pre else 0)

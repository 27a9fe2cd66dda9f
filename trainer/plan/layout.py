"""One way to lay a run on its ranks, and what then lies on each. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.config.model import ModelConfig, Norm
from trainer.config.parallel import Offload, Precision, Recompute
from trainer.config.pretrain import PretrainConfig
from trainer.model.arithmetic import padded_n_head, padded_vocab_size


@dataclass(frozen=True)
class Layout:
    dp: int
    tp: int
    sequence_parallel: bool
    zero_stage: int
    recompute: Recompute
    offload: Offload
    micro_batch_size: int

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    def config(self, cfg: PretrainConfig) -> PretrainConfig:
        """`cfg` with this layout in place of what it leaves open."""
        parallel = replace(
            cfg.parallel,
            tp=self.tp,
            sequence_parallel=self.sequence_parallel,
            zero_stage=self.zero_stage,
            recompute=self.recompute,
            offload=self.offload,
        )
        return replace(cfg, parallel=parallel, micro_batch_size=self.micro_batch_size)

    def __str__(self) -> str:
        words = [f"dp={self.dp} tp={self.tp} ZeRO-{self.zero_stage} recompute={self.recompute.value}"]
        words += ["offload=cpu"] if self.offload is Offload.cpu else []
        return f"{' '.join(words)} micro_batch_size={self.micro_batch_size}"


def local_params(model: ModelConfig, tp: int) -> int:
    """Parameters on one of `tp` ranks before ZeRO, padding included; equal on all of them (trainer/model/specs.py)."""
    c, heads = model.n_embd, padded_n_head(model.n_head, tp) * model.head_dim // tp
    inner = 4 * c // tp
    block = 4 * c + (3 * heads * c + 3 * heads) + (heads * c + c) + (inner * c + inner) + (inner * c + c)
    last = 2 * c if model.norm is Norm.pre else 0
    return (padded_vocab_size(model.vocab_size, tp) // tp + model.n_ctx) * c + model.n_layer * block + last


def tensors(model: ModelConfig) -> int:
    """Parameter tensors: DeepSpeed's hooks, copies and norms cost by the piece."""
    return 2 + 12 * model.n_layer + (2 if model.norm is Norm.pre else 0)


def element_bytes(cfg: PretrainConfig) -> int:
    """Of a weight or an activation as the model computes with it."""
    return 4 if cfg.precision is Precision.fp32 else 2

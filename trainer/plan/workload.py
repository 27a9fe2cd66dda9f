"""The settings that the memory and the speed of a run depend on, whatever its layout. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.model import ModelConfig
from trainer.config.optim import Kind
from trainer.config.parallel import Precision
from trainer.config.pretrain import PretrainConfig


@dataclass(frozen=True)
class Workload:
    """One optimizer step: `tokens_per_step` tokens in windows of `model.n_ctx`."""

    model: ModelConfig
    optimizer: Kind
    precision: Precision
    tokens_per_step: int
    document_mask: bool
    background: bool  # checkpoints are written in the background, from a copy

    @classmethod
    def of(cls, cfg: PretrainConfig) -> Workload:
        """The workload of a full step; of a stage or of a ramp's smaller step it is a `replace` of this one."""
        return cls(
            model=cfg.model,
            optimizer=cfg.optim.kind,
            precision=cfg.precision,
            tokens_per_step=cfg.tokens_per_step,
            document_mask=cfg.data.document_mask,
            background=cfg.checkpoint.background,
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation in the type that the model computes with."""
        return 4 if self.precision is Precision.fp32 else 2

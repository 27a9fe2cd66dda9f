"""DeepSpeed's door: one engine for ZeRO 1-3, fp32 and bf16, configured from our config only.

What is promised here and not by DeepSpeed itself: the gradient is that of (sum of losses over all ranks and micro
steps / global count of valid tokens), a step whose gradient is not finite changes nothing, and the optimizer's state
exists from the start. Private names of DeepSpeed in this file: `optimizer._global_grad_norm`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.config import Geometry, UserError
from data_pipeline.loader import Batch
from trainer import parallel
from trainer.config import Precision, PretrainConfig
from trainer.fragments import create_state
from trainer.optim import adamw
from trainer.parallel import Mesh

REDUCE_BUCKET = (
    500_000_000  # elements; DeepSpeed allocates this many for ZeRO-2 and 3, so never more than the model has
)


class NonFiniteError(UserError):
    """The global gradient norm is inf or nan; weights and moments are as they were before the step."""


class Engine:
    """A model under ZeRO. Collective: every rank calls the same methods in the same order.

    One step is `grad_accum_steps` x `backward`, then `step`.
    """

    def __init__(self, model: nn.Module, cfg: PretrainConfig, geometry: Geometry, mesh: Mesh) -> None:
        self.cfg = cfg
        self.mesh = mesh
        self.grad_accum_steps = geometry.grad_accum_steps
        self._micro_steps = 0
        self._norm: float | None = None
        self.adam = adamw(model, cfg.optim)
        self.adam.gate = self._gate
        quiet()
        numel = sum(p.numel() for p in model.parameters())
        with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory figures that nobody asked for
            self.deepspeed, *_ = parallel.deepspeed.initialize(
                model=model,
                optimizer=self.adam,
                config=deepspeed_config(cfg, geometry, numel),
                mpu=parallel.mpu(mesh),
                dist_init_required=False,
            )
        if cfg.parallel.sequence_parallel:
            parallel.register_sequence_parallel_hooks(self.module, mesh)
        create_state(self.deepspeed.optimizer, self.adam)

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def backward(self, batch: Batch, global_valid_tokens: float | Tensor) -> Tensor:
        """Forward and backward of one micro batch.

        `global_valid_tokens`: labels that count, over all data-parallel ranks and micro steps of this step.
        Returns the detached sum of -log p over this rank's valid labels, fp32 scalar, equal on all tp ranks.
        """
        loss_sum = self._loss_sum(batch)
        # ZeRO averages gradients over dp; the division by the number of micro steps is switched off.
        scale = torch.as_tensor(self.mesh.dp / global_valid_tokens, dtype=torch.float32, device=loss_sum.device)
        self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
        self._micro_steps += 1
        if self._micro_steps < self.grad_accum_steps:
            self.deepspeed.step()  # not at the boundary: only counts
        return loss_sum.detach()

    def step(self, lr: float) -> float:
        """Update the weights at rate `lr`; returns the global gradient norm before clipping.

        Raises:
            NonFiniteError: on every rank, with weights and moments unchanged.
        """
        if self._micro_steps != self.grad_accum_steps:
            raise RuntimeError(f"step after {self._micro_steps} of {self.grad_accum_steps} micro steps")
        self._micro_steps = 0
        self._norm = None
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        norm = self._grad_norm()  # where a wrapper saw inf or nan by itself, it never came to the gate
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm is {norm} at lr={lr:.3g}: this step's update is not made; "
                "give a lower optim.lr or a longer optim.schedule.warmup, and resume from the last checkpoint"
            )
        return norm

    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of -log p over this rank's valid labels; leaves everything of training as it was."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                return self._loss_sum(batch)
        finally:
            self.deepspeed.train()

    def _loss_sum(self, batch: Batch) -> Tensor:
        return self.deepspeed(*(t.to(self.mesh.device, non_blocking=True) for t in batch))

    def _gate(self) -> bool:
        return math.isfinite(self._grad_norm())

    def _grad_norm(self) -> float:
        """The norm that the ZeRO wrapper has just computed, read from the device once a step."""
        if self._norm is None:
            self._norm = float(self.deepspeed.optimizer._global_grad_norm)
        return self._norm


def deepspeed_config(cfg: PretrainConfig, geometry: Geometry, numel: int) -> dict[str, Any]:
    """DeepSpeed's JSON, all of it; `numel` = parameters on this rank before ZeRO."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": geometry.micro_batch_size,
        "gradient_accumulation_steps": geometry.grad_accum_steps,
        "gradient_clipping": cfg.optim.grad_clip,
        "zero_optimization": {"stage": cfg.parallel.zero_stage, "reduce_bucket_size": min(REDUCE_BUCKET, numel)},
        "zero_allow_untested_optimizer": True,  # it is torch's AdamW with a gate
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro step
        "communication_data_type": "fp32",  # otherwise bf16 would sum over ranks what fp32 has accumulated
    }
    if cfg.precision is Precision.bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # the gate is the check, without a second pass
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def quiet() -> None:
    """What DeepSpeed and torch say of DeepSpeed's own choices; what matters here is an error of ours."""
    parallel.deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def make_deterministic() -> None:
    """The same bits on every run of the same layout; before the first collective and matrix product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # one order of summing, whatever NCCL's tuner thinks of the moment
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

"""One engine for ZeRO 1-3, in fp32, bf16 and fp8, configured from our config only.

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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from data_pipeline.order.geometry import Geometry
from data_pipeline.stream.loader import Batch
from trainer.config.optim import Kind
from trainer.config.parallel import Offload, Precision
from trainer.config.pretrain import PretrainConfig
from trainer.distributed import mesh as parallel
from trainer.distributed.mesh import Mesh
from trainer.engine.bf16_optimizer import flatten
from trainer.engine.fragments import create_state, places
from trainer.engine.muon import GatedMuon, muon
from trainer.engine.optimizers import adamw
from trainer.model.arithmetic import REDUCE_BUCKET


class NonFiniteError(UserError):
    """The global gradient norm `norm` is inf or nan; weights and moments are as they were before the step."""

    def __init__(self, message: str, norm: float) -> None:
        super().__init__(message)
        self.norm = norm


def accept_all(norm: float) -> bool:
    """Any step whose gradient norm is finite."""
    return True


class Engine:
    """A model under ZeRO. Collective: every rank calls the same methods in the same order.

    One step is some `backward`, the last of them with `last=True`, then `step`. Steps may differ in how many, and
    micro batches in how many windows they hold.
    """

    def __init__(self, model: nn.Module, cfg: PretrainConfig, geometry: Geometry, mesh: Mesh) -> None:
        self.cfg = cfg
        self.mesh = mesh
        self._complete = False  # the last backward of the step was made
        self._norm: float | None = None
        self._accept: Callable[[float], bool] = accept_all
        self._open: bool | None = None  # what the gate has said in this step; some wrappers ask for each group
        self.adam = adamw(model, cfg.optim) if cfg.optim.kind is Kind.adamw else muon(model, cfg.optim)
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
        if isinstance(self.adam, GatedMuon):
            dtype = torch.float32 if cfg.precision is Precision.fp32 else torch.bfloat16
            self.adam.attach(places(self.module, self.adam), mesh, cfg.model.n_head, dtype)
        # Elsewhere ZeRO averages gradients over dp; the division by the number of micro steps is switched off.
        flat = flatten(self.deepspeed, mesh)
        if not flat and has_flat(cfg):
            raise RuntimeError(f"DeepSpeed made a {type(self.deepspeed.optimizer)} where zero1.py knows BF16_Optimizer")
        self._averaged_over = 1 if flat else mesh.dp

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def backward(self, batch: Batch, global_valid_tokens: float | Tensor, last: bool) -> Tensor:
        """Forward and backward of one micro batch; `last` of its step or not, on every rank alike.

        `global_valid_tokens`: labels that count, over all data-parallel ranks and micro steps of this step.
        Returns the detached sum of -log p over this rank's valid labels, fp32 scalar, equal on all tp ranks.
        """
        if self._complete:
            raise RuntimeError("backward after the last one of a step: step first")
        self._complete = last
        self.deepspeed.set_gradient_accumulation_boundary(last)  # not every so many: a step may have any number
        loss_sum = self._loss_sum(batch)
        scale = torch.as_tensor(self._averaged_over / global_valid_tokens, dtype=torch.float32, device=loss_sum.device)
        self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)
        return loss_sum.detach()

    def step(self, lr: float, accept: Callable[[float], bool] = accept_all) -> float:
        """Update the weights at rate `lr`; returns the global gradient norm before clipping.

        `accept` is asked once, with a norm that is finite; where it says no, on all ranks alike, weights and moments
        stay as they are.

        Raises:
            NonFiniteError: on every rank, with weights and moments unchanged.
        """
        if not self._complete:
            raise RuntimeError("step before a backward with last=True")
        self._complete = False
        self._norm, self._accept, self._open = None, accept, None
        for group in self.adam.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        self.deepspeed.step()
        norm = self._grad_norm()  # where a wrapper saw inf or nan by itself, it never came to the gate
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {norm}: this step's update is not made", norm)
        return norm

    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of -log p over this rank's valid labels; leaves everything of training as it was."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                return self._loss_sum(batch)
        finally:
            self.deepspeed.train()

    def close(self) -> None:
        """Gives the memory of weights, masters and moments back, also what DeepSpeed's cycles would keep for ever."""
        zero = self.deepspeed.optimizer
        self.deepspeed.destroy()
        for p in self.module.parameters():  # under ZeRO-3 they outlive their engine, empty from here on
            vars(p).clear()
            p.data = p.data.new_empty(0)
        self.adam.state.clear()
        self.adam.param_groups.clear()
        vars(zero).clear()

    def _loss_sum(self, batch: Batch) -> Tensor:
        return self.deepspeed(*(t.to(self.mesh.device, non_blocking=True) for t in batch if t is not None))

    def _gate(self) -> bool:
        if self._open is None:
            norm = self._grad_norm()
            self._open = math.isfinite(norm) and self._accept(norm)
        return self._open

    def _grad_norm(self) -> float:
        """The norm that the ZeRO wrapper has just computed, read from the device once a step."""
        if self._norm is None:
            self._norm = float(self.deepspeed.optimizer._global_grad_norm)
        return self._norm


def has_flat(cfg: PretrainConfig) -> bool:
    """Whether `zero1.py` does the work between backward and update."""
    parallel = cfg.parallel
    return cfg.precision is not Precision.fp32 and parallel.zero_stage == 1 and parallel.offload is Offload.none


def deepspeed_config(cfg: PretrainConfig, geometry: Geometry, numel: int) -> dict[str, Any]:
    """DeepSpeed's JSON, all of it; `numel` = parameters on this rank before ZeRO."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": geometry.micro_batch_size,
        "gradient_accumulation_steps": 1,  # what `backward(last=...)` says counts; so nothing is ever divided by it
        "gradient_clipping": cfg.optim.grad_clip,
        "zero_optimization": {"stage": cfg.parallel.zero_stage, "reduce_bucket_size": min(REDUCE_BUCKET, numel)},
        "zero_allow_untested_optimizer": True,  # torch's AdamW or our Muon, each with a gate
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro step
        "communication_data_type": "fp32",  # otherwise bf16 would sum over ranks what fp32 has accumulated
    }
    if cfg.precision is not Precision.fp32:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # the gate is the check, without a second pass
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if cfg.parallel.offload is Offload.cpu:
        zero = config["zero_optimization"]
        for part in ("offload_optimizer", "offload_param")[: 2 if cfg.parallel.zero_stage == 3 else 1]:
            zero[part] = {"device": "cpu", "pin_memory": True}
        config["zero_force_ds_cpu_optimizer"] = False  # its own CPU Adam is compiled at run time; torch's is not
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

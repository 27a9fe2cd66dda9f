"""One engine for ZeRO 1-3, in fp32, bf16 and fp8, configured from our config only.

Promised here and not by DeepSpeed itself: the gradient is that of the objective's terms, each summed over all ranks and
micro steps and divided by its global count; a step whose gradient is not finite changes nothing; a micro step may leave
parts of the module out; and the optimizer's state exists from the start. Private names of DeepSpeed in this file:
`optimizer._global_grad_norm`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from trainer.config.optim import Kind, OptimConfig
from trainer.config.parallel import Offload, ParallelConfig, Precision
from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed_api import connect, deepspeed, flat_in_fp32, mpu, register_sequence_parallel_hooks
from trainer.engine.flat_zero1 import flatten
from trainer.engine.fragments import create_state, partitions
from trainer.engine.muon import GatedMuon, muon
from trainer.engine.optimizers import adamw
from trainer.engine.parts import PartNorms, parts_of, touch_unused
from trainer.model.arithmetic import REDUCE_BUCKET
from trainer.model.gpt import GPT
from trainer.model.specs import ParamSpec
from trainer.objective.objective import Objective


class NonFiniteError(UserError):
    """The global gradient norm `norm` is inf or nan; weights and moments are as they were before the step."""

    def __init__(self, message: str, norm: float) -> None:
        super().__init__(message)
        self.norm = norm


def accept_all(norm: float) -> bool:
    """Any step whose gradient norm is finite."""
    return True


class Engine:
    """A module under ZeRO, trained for an objective. Collective: every rank calls the same methods in the same order.

    Models that are trained together are one module under one engine. One step is some `backward`, the last of them
    with `last=True`, then `step`. Steps may differ in how many, and micro batches in how many rows they hold.
    """

    def __init__(
        self,
        model: GPT,
        objective: Objective,
        optim: OptimConfig,
        layout: ParallelConfig,
        precision: Precision,
        mesh: Mesh,
    ) -> None:
        self.objective = objective
        self.mesh = mesh
        self.specs = model.specs()
        check_specs(model, self.specs, mesh.tp)
        self._complete = False  # the last backward of the step was made
        self._norm: float | None = None
        self._accept: Callable[[float], bool] = accept_all
        self._open: bool | None = None  # the gate's answer in this step; some wrappers ask for each group
        self.adam = adamw(model, optim) if optim.kind is Kind.adamw else muon(model, optim)
        self.adam.gate = self._gate
        quiet()
        numel = sum(p.numel() for p in model.parameters())
        flat = is_flat(layout)
        in_fp32 = flat_in_fp32() if flat and precision is Precision.fp32 else contextlib.nullcontext()
        with in_fp32, contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory that nobody asked for
            connect(mesh)
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.adam,
                config=deepspeed_config(optim.grad_clip, layout, precision, numel),
                mpu=mpu(mesh),
                dist_init_required=False,
            )
        if layout.sequence_parallel:
            register_sequence_parallel_hooks(self.module, mesh)
        create_state(self.deepspeed.optimizer, self.adam)
        if isinstance(self.adam, GatedMuon):
            dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
            self.adam.attach(partitions(self.module, self.adam), mesh, n_heads(self.module), dtype)
        # Elsewhere ZeRO averages gradients over dp; the division by the number of micro steps is switched off.
        if flat:
            flatten(self.deepspeed, mesh)
        averaged_over = 1 if flat else mesh.dp
        self._weights = averaged_over * torch.tensor(objective.weights, dtype=torch.float64, device=mesh.device)
        self._touches = layout.zero_stage == 3 or layout.offload is not Offload.none
        self.part_norms: dict[str, float] = {}  # of the last step; empty where the module has one part
        self._part_norms: PartNorms | None = None
        if len(parts_of(self.module)) > 1:
            self._part_norms = PartNorms(self.module, partitions(self.module, self.adam), mesh)
            self.adam.observe = self._part_norms.observe

    @property
    def module(self) -> GPT:
        module: GPT = self.deepspeed.module
        return module

    def backward(self, batch: tuple[Tensor | None, ...], counts: Tensor, last: bool) -> Tensor:
        """Forward and backward of one micro batch; `last` of its step or not, on every rank alike.

        `counts`: [k] on the device, each term's count over all data-parallel ranks and micro steps of this step; a term
        whose count is 0 contributes 0, and NaN makes the gradient NaN, which `step` refuses on every rank.
        Returns the detached sums [k] of this rank's terms, fp32, equal on all tp ranks.
        """
        if self._complete:
            raise RuntimeError("backward after the last one of a step: step first")
        self._complete = last
        self.deepspeed.set_gradient_accumulation_boundary(last)  # not every so many: a step may have any number
        sums = self._sums(batch)
        scale = (self._weights / counts).where(counts != 0, 0.0).to(torch.float32)
        self.deepspeed.backward((sums * scale).sum(), scale_wrt_gas=False)
        return sums.detach()

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
        self._norm = None
        self._accept = accept
        self._open = None
        for group in self.adam.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        self.deepspeed.step()
        norm = self._grad_norm()  # where a wrapper saw inf or nan by itself, it never came to the gate
        if self._part_norms is not None:
            self.part_norms = self._part_norms.take(norm)
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {norm}: this step's update is not made", norm)
        return norm

    def evaluate(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        """The objective's sums [k] over this rank's batch; leaves everything of training as it was."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                return self._sums(batch)
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

    def _sums(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        sums: Tensor = self.deepspeed(self._forward, to_device(batch, self.mesh.device))
        return sums

    def _forward(self, module: GPT, batch: tuple[Tensor | None, ...]) -> Tensor:
        """The body of the module's forward, inside of DeepSpeed's hooks."""
        sums = self.objective.sums(module, batch)
        return touch_unused(module, sums) if self._touches and sums.requires_grad else sums

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


def to_device(batch: tuple[Tensor | None, ...], device: torch.device) -> Any:
    """The same NamedTuple with its tensors on the device."""
    kind: Any = type(batch)
    return kind(*(t if t is None else t.to(device, non_blocking=True) for t in batch))


def check_specs(module: nn.Module, specs: Mapping[str, ParamSpec], tp: int) -> None:
    """Compare a module's parameters, before ZeRO partitions them, with what it declares: checkpoints go by that.

    Raises:
        ValueError: naming every parameter that is missing, undeclared or of another shape.
    """
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    declared = {name: spec.local_shape(tp) for name, spec in specs.items()}
    wrong = [f"{name} is declared and missing" for name in declared.keys() - shapes.keys()]
    wrong += [f"{name} is not declared" for name in shapes.keys() - declared.keys()]
    common = shapes.keys() & declared.keys()
    wrong += [f"{n} is {shapes[n]}, declared {declared[n]}" for n in common if shapes[n] != declared[n]]
    if wrong:
        raise ValueError(f"{type(module).__name__}'s parameters differ from its specs(): {'; '.join(sorted(wrong))}")


def is_flat(layout: ParallelConfig) -> bool:
    """Return True where `flat_zero1.py` does the work between backward and update."""
    return layout.zero_stage == 1 and layout.offload is Offload.none


def n_heads(module: nn.Module) -> dict[str, int]:
    """The number of attention heads of each trunk, by the trunk's prefix."""
    return {f"{name}.".lstrip("."): m.cfg.n_head for name, m in module.named_modules() if isinstance(m, GPT)}


def deepspeed_config(grad_clip: float, layout: ParallelConfig, precision: Precision, numel: int) -> dict[str, Any]:
    """All of DeepSpeed's JSON; `numel`: parameters on this rank before ZeRO."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # nothing reads it, and rows of a micro batch differ
        "gradient_accumulation_steps": 1,  # `backward(last=...)` counts instead; so nothing is ever divided by it
        "gradient_clipping": grad_clip,
        "zero_optimization": {"stage": layout.zero_stage, "reduce_bucket_size": min(REDUCE_BUCKET, numel)},
        "zero_allow_untested_optimizer": True,  # torch's AdamW or our Muon, each with a gate
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro step
        "communication_data_type": "fp32",  # otherwise bf16 would sum over ranks what fp32 has accumulated
    }
    if precision is not Precision.fp32:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # the gate is the check, without a second pass
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if layout.offload is Offload.cpu:
        zero = config["zero_optimization"]
        for part in ("offload_optimizer", "offload_param")[: 2 if layout.zero_stage == 3 else 1]:
            zero[part] = {"device": "cpu", "pin_memory": True}
        config["zero_force_ds_cpu_optimizer"] = False  # its own CPU Adam is compiled at run time; torch's is not
    return config


def quiet() -> None:
    """Silence messages about DeepSpeed's own choices; what matters here is an error of ours."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def make_deterministic() -> None:
    """The same bits on every run of the same layout; before the first collective and matrix product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # one order of summing, whatever NCCL's tuner thinks of the moment
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

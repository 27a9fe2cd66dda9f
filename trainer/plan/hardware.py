"""The devices that the plan knows, from their makers' data sheets. Standard library only."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from conf.errors import UserError
from trainer.config.parallel import Precision
from trainer.run.nvidia_smi import nvidia_smi

CPU = "cpu"
DRIVER = (
    Path("/dev/nvidia0"),
    Path("/proc/driver/nvidia"),
)  # one exists if there is a GPU


@dataclass(frozen=True)
class Gpu:
    """One device. `memory_gib`: as the driver shows it, less than the name's GB if ECC or the firmware takes some."""

    name: str
    pattern: str  # of the name that nvidia-smi and torch give, with its memory beside
    memory_gib: float
    tflops: float  # dense bf16 with fp32 sums
    fp8_tflops: float | None  # dense, with fp32 sums; None: no fp8 products
    fp32_tflops: float
    hbm_gb_s: float
    link_gb_s: float  # to the other GPUs of the node, one direction: NVLink, or PCIe where there is none
    price: float  # USD an hour


# Memory: `nvidia-smi --query-gpu=memory.total`. TFLOP/s, GB/s: NVIDIA's data sheets, without sparsity; a link's GB/s
# there counts both directions, here one. Prices are this project's round assumption (November 2026, on demand), not an
# offer: give cluster.price_per_gpu_hour.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200_141gb", r"H200(?! NVL)", 140.4, 989.4, 1978.9, 67.0, 4800, 450, 3.50),  # H200 data sheet, SXM
        Gpu("h100_94gb", r"H100 NVL", 93.6, 835.5, 1670.5, 60.0, 3938, 300, 2.60),  # H100 NVL product brief
        Gpu("h100_pcie", r"H100 PCIe", 79.6, 756.5, 1513, 51.0, 2000, 64, 2.00),  # H100 data sheet, PCIe 5.0 x16
        Gpu("h100_80gb", r"H100", 79.6, 989.4, 1978.9, 67.0, 3350, 450, 2.50),  # H100 data sheet, SXM5
        # PCIe cards of these names are slower and have no NVLink: `gpu=` has to say what is taken for them.
        Gpu("a100_80gb", r"A100(?!.*PCIe).*80", 80.0, 311.9, None, 19.5, 2039, 300, 1.50),  # A100 80GB data sheet, SXM4
        Gpu("a100_40gb", r"A100(?!.*PCIe).*40", 40.0, 311.9, None, 19.5, 1555, 300, 1.10),  # A100 data sheet, SXM4
        Gpu("l40s_48gb", r"L40S", 45.0, 362.0, 733, 91.6, 864, 32, 0.90),  # L40S data sheet; PCIe 4.0 x16
        Gpu("rtx4090_24gb", r"RTX 4090", 24.0, 165.2, 330.3, 82.6, 1008, 32, 0.40),  # Ada architecture paper; PCIe 4.0
        Gpu("rtx3090_24gb", r"RTX 3090\b", 24.0, 71.2, None, 35.6, 936, 32, 0.25),  # Ampere GA102 paper; PCIe 4.0
        # No bf16 units: bf16 products run at the fp32 rate (V100 data sheet, SXM2).
        Gpu("v100_32gb", r"V100(?!.*PCIe).*32", 32.0, 15.7, None, 15.7, 900, 150, 0.60),
        # Two cores of a server with AVX-512 and what of its memory bandwidth they draw; memory is 4 GiB a rank.
        Gpu(CPU, r"(?!)", 4.0, 0.15, None, 0.1, 15, 10, 0.05),
    )
}


def gpu_named(name: str, key: str = "cluster.gpu") -> Gpu:
    """The row of that name. Raises UserError if there is none; `key` is the setting that gave the name."""
    if name not in GPUS:
        raise UserError(f"{key}={name}: give one of {', '.join(GPUS)}")
    return GPUS[name]


def installed_gpu() -> Gpu | None:
    """This machine's GPU as nvidia-smi names it; None if torch would find none.

    Raises:
        UserError: a GPU that no row describes, or that nvidia-smi does not name.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == CPU:
        return None
    rows = nvidia_smi("name", "memory.total")
    if not rows and any(path.exists() for path in DRIVER):
        raise UserError(
            "there is NVIDIA's driver here, but nvidia-smi names no GPU: give gpu= one of "
            f"{', '.join(GPUS)}, or name parallel and micro_batch_size"
        )
    return recognise(*rows[0].values()) if rows else None


def check_precision(precision: Precision, gpu: Gpu) -> None:
    """Raise UserError if the GPU has no products of that precision."""
    if precision is Precision.fp8 and gpu.fp8_tflops is None:
        able = [name for name, row in GPUS.items() if row.fp8_tflops is not None]
        raise UserError(
            f"precision=fp8: {gpu.name} has no fp8 products: give precision=bf16, or a GPU of {', '.join(able)}"
        )


def recognise(name: str, mib: str) -> Gpu:
    """The row of a GPU by the name and the MiB that nvidia-smi gives. Raises UserError if there is none."""
    gib = round(int(mib) / 1024) if mib.isdecimal() else 0
    for gpu in GPUS.values():
        if re.search(rf"\b{gpu.pattern}", f"{name} {gib}GB", re.IGNORECASE):
            if abs(gpu.memory_gib - gib) > 0.05 * gpu.memory_gib:
                break  # a slice of it, or another model of the same name
            return gpu
    raise UserError(
        f"the GPU here is {name} with {mib} MiB, which no row of the plan's table describes: "
        f"give gpu={', '.join(GPUS)}, the one that is nearest below, or name parallel and micro_batch_size"
    )

"""Seconds of one step, part by part: a roofline with measured constants. docs/plan.md has the formulas.

Legend: M tokens of a micro batch, C n_embd, D head dim, T n_ctx.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trainer.config.parallel import Offload, Precision, Recompute
from trainer.plan.attention_cost import biased, visited
from trainer.plan.hardware import CPU, Gpu
from trainer.plan.layout import Layout, local_heads, local_params, local_vocab, tensors
from trainer.plan.network import Cluster, dp_seconds, tp_seconds
from trainer.plan.workload import Workload

# Calibrated on one H100 SXM (docs/benchmarks/plan_h100.md), and taken as shares of the peak on every other device.
GEMM_SHARE, GEMM_HALF = 0.838, 230  # share of the peak in a huge product; the smallest dimension at which half is left
ATTENTION_SHARE = 0.2375  # cuDNN's causal kernel, forward and backward, over the blocks that it visits
FP8_SHARE = 0.89  # of fp8's peak over bf16's that products gain: 1.66 to 1.92 of 2, measured on bare products
FP8_ROUNDING = 5  # bytes an element that is rounded: read for the largest, read and written; an assumption
HBM_SHARE = 0.8  # of the memory's rate in elementwise kernels; an assumption
TENSOR_S = 11e-6  # DeepSpeed's Python for one parameter tensor in one micro step: fits the 355M row
NOT_ONE_GRAPH = 3.0  # times the elementwise traffic where a block is no single graph (megatron-core's linears, ZeRO-3)
ZERO3_HOOKS = 3.0  # times TENSOR_S: hooks before and after each module, both ways; an assumption
HOST_GB_S, PCIE_GB_S = 100.0, 25.0  # offload: the CPU's memory for one rank's update, the copy there; assumptions
LAYER_FORWARD, LAYER_BACKWARD = (9, 8), (12, 19)  # elements of C read and written, (whole, split over tp)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step on each rank."""

    matmul: float
    attention: float
    elementwise: float
    loss: float
    optimizer: float
    host: float  # Python between kernels
    offload: float
    tp_communication: float
    dp_communication: float  # the part that is not hidden: all, except in ZeRO-3, whose gathers overlap the products

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def parts(self) -> dict[str, float]:
        """Seconds by the name of the part."""
        return asdict(self)


def step_seconds(work: Workload, layout: Layout, cluster: Cluster) -> Step:
    """The parts of a step of this layout, without pauses for checkpoints and validation."""
    gpu, model = cluster.gpu, work.model
    micro_steps = work.tokens_per_step // (model.n_ctx * layout.micro_batch_size * layout.dp)
    matmul = micro_steps * _matmul(work, layout, gpu)
    attention = micro_steps * _attention(work, layout, gpu)
    elementwise = micro_steps * _elementwise(work, layout, gpu)
    tokens = layout.micro_batch_size * model.n_ctx
    # bytes: read for the sum and the label, written and read as gradient
    logits = 5 * work.element_bytes * tokens * local_vocab(model, layout.tp)
    sent = dp_seconds(work, layout, cluster, micro_steps)
    if layout.zero_stage == 3:  # overlap_comm is DeepSpeed's default there
        sent = max(0.0, sent - matmul - attention)
    hooks = TENSOR_S * (ZERO3_HOOKS if layout.zero_stage == 3 else 1.0)
    update, offload = _update(work, layout, gpu, micro_steps)
    return Step(
        matmul=matmul,
        attention=attention,
        elementwise=elementwise,
        loss=micro_steps * logits / _bytes_s(gpu),
        optimizer=update,
        host=micro_steps * hooks * tensors(model),
        offload=offload,
        tp_communication=micro_steps * tp_seconds(work, layout, cluster),
        dp_communication=sent,
    )


def one_graph(layout: Layout, gpu: Gpu) -> bool:
    """Return True if torch.compile sees a block whole: megatron-core's linears and ZeRO-3 break its graph."""
    return gpu.name != CPU and layout.tp == 1 and layout.zero_stage < 3


def gemm_flops_s(m: int, k: int, n: int, gpu: Gpu, precision: Precision) -> float:
    """FLOP/s of an m x k by k x n product: short sides leave a part of the device idle."""
    peak = (gpu.fp32_tflops if precision is Precision.fp32 else gpu.tflops) * 1e12
    return GEMM_SHARE * peak / (1 + GEMM_HALF / min(m, k, n))


def _matmul(work: Workload, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a micro step: 2 M K N FLOPs forward, twice that backward; full recompute repeats a layer's forward."""
    model, m = work.model, layout.micro_batch_size * work.model.n_ctx
    c, heads = model.n_embd, local_heads(model, layout.tp) * model.head_dim
    layer = [(c, 3 * heads), (heads, c), (c, 4 * c // layout.tp), (4 * c // layout.tp, c)]
    passes = 4 if layout.recompute is Recompute.full else 3
    head = (c, local_vocab(model, layout.tp))

    def seconds(k: int, n: int) -> float:
        return 2.0 * m * k * n / gemm_flops_s(m, k, n, gpu, work.precision)

    gain = FP8_SHARE * (gpu.fp8_tflops or gpu.tflops) / gpu.tflops if work.precision is Precision.fp8 else 1.0
    return model.n_layer * passes * sum(seconds(k, n) for k, n in layer) / gain + 3 * seconds(*head)


def _attention(work: Workload, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a micro step: 4 T² D FLOPs a head over the share of visited blocks, backward 2.5 times that."""
    model, heads = work.model, local_heads(work.model, layout.tp)
    whole = 4.0 * model.n_ctx**2 * model.head_dim * heads * layout.micro_batch_size
    passes = 4.5 if layout.recompute is Recompute.full else 3.5
    peak = (gpu.fp32_tflops if work.precision is Precision.fp32 else gpu.tflops) * 1e12
    whole_square = biased(model, work.document_mask, gpu.name != CPU)
    seen = (1.0 if model.kind(i) in whole_square else visited(model, i) for i in range(model.n_layer))
    flops = whole * passes * sum(seen)
    return flops / (ATTENTION_SHARE * peak)


def _elementwise(work: Workload, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a micro step: LayerNorm, GELU, residual sums, biases' gradients, by the bytes that they move."""
    tokens = layout.micro_batch_size * work.model.n_ctx
    passes = [LAYER_FORWARD, LAYER_BACKWARD] + [LAYER_FORWARD] * (layout.recompute is not Recompute.none)
    share = layout.tp if layout.sequence_parallel else 1
    elements = sum(whole / share + split / layout.tp for whole, split in passes)
    traffic = work.element_bytes * tokens * work.model.n_layer * work.model.n_embd * elements
    if work.precision is Precision.fp8:  # inputs 7 C, outputs' gradients 9 C, the weights
        c = work.model.n_embd
        traffic += FP8_ROUNDING * work.model.n_layer * (16 * tokens * c + 12 * c * c)
    return traffic * (1.0 if one_graph(layout, gpu) else NOT_ONE_GRAPH) / _bytes_s(gpu)


def _update(work: Workload, layout: Layout, gpu: Gpu, micro_steps: int) -> tuple[float, float]:
    """(seconds on the device, seconds on the host and of the copies there) of a step's gradients and update.

    Bytes a parameter of ZeRO-1 (flat_zero1.py): gradients are written in the weights' type and copied to fp32, in bf16
    8, in later micro steps added, 12; the update, on its part: norm 4, AdamW, which clips, 28, bf16 weights 6. Of
    DeepSpeed's own wrappers: written, copied to fp32, added, 18; ZeRO-2 and 3 copy them into a bucket and back, 34; the
    update: norm 4, clipping 8, AdamW 28, weights 6, zeros 4.
    """
    p = local_params(work.model, layout.tp)
    if layout.zero_stage == 1 and layout.offload is Offload.none:
        low = work.element_bytes
        update = 32 + (6 if low == 2 else 0)
        return p * ((2 * low + 8) * micro_steps - 4 + update / layout.dp) / _bytes_s(gpu), 0.0
    adding = micro_steps * p * (18 if layout.zero_stage == 1 else 34) / _bytes_s(gpu)
    if layout.offload is Offload.none:
        return adding + 50 * p / layout.dp / _bytes_s(gpu), 0.0
    copied = (4 * micro_steps + 2) * p / layout.dp + (4 * micro_steps * p if layout.zero_stage == 3 else 0)
    return adding, copied / (PCIE_GB_S * 1e9) + 50 * p / layout.dp / (HOST_GB_S * 1e9)


def _bytes_s(gpu: Gpu) -> float:
    return HBM_SHARE * gpu.hbm_gb_s * 1e9

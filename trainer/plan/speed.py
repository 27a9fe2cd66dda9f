"""Seconds of one step, part by part: a roofline with constants from measurements. docs/plan.md has the reckoning.

Legend: M tokens of a micro batch, C n_embd, D head dim, T n_ctx.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainer.config.parallel import Offload, Precision, Recompute
from trainer.config.pretrain import PretrainConfig
from trainer.model.arithmetic import padded_n_head, padded_vocab_size
from trainer.plan.attention_cost import biased, visited
from trainer.plan.hardware import CPU, Gpu
from trainer.plan.layout import Layout, element_bytes, local_params, tensors
from trainer.plan.network import Cluster, dp_seconds, tp_seconds

# Calibrated on one H100 SXM (docs/benchmarks/plan_h100.md), and taken as shares of the peak on every other device.
GEMM_SHARE, GEMM_HALF = 0.838, 230  # share of the peak in a huge product; the smallest dimension at which half is left
ATTENTION_SHARE = 0.2375  # cuDNN's causal kernel, forward and backward, over the blocks that it visits
FP8_SHARE = 0.89  # of fp8's peak over bf16's that products gain: 1.66 to 1.92 of 2, measured on bare products
FP8_ROUNDING = 5  # bytes an element that is rounded: read for the largest, read and written; an assumption
HBM_SHARE = 0.8  # of the memory's rate in elementwise kernels; an assumption
TENSOR_S = 11e-6  # DeepSpeed's Python for one parameter tensor in one micro step: fits the 355M row
NOT_ONE_GRAPH = 3.0  # times the elementwise traffic where a block is no single graph (megatron-core's linears, ZeRO-3)
ZERO3_HOOKS = 3.0  # times TENSOR_S: hooks before and after each module, both ways; an assumption
HOST_GB_S, PCIE_GB_S = 100.0, 25.0  # offload: the CPU's memory for one rank's update, the way there; assumptions
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
    dp_communication: float  # what is not hidden: all, but for ZeRO-3, whose gathers run beside the products

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def step_seconds(cfg: PretrainConfig, layout: Layout, cluster: Cluster) -> Step:
    gpu, model = cluster.gpu, cfg.model
    micro_steps = cfg.tokens_per_step // (model.n_ctx * layout.micro_batch_size * layout.dp)
    matmul = micro_steps * _matmul(cfg, layout, gpu)
    attention = micro_steps * _attention(cfg, layout, gpu)
    elementwise = micro_steps * _elementwise(cfg, layout, gpu)
    size = element_bytes(cfg)
    tokens = layout.micro_batch_size * model.n_ctx
    vocabulary = padded_vocab_size(model.vocab_size, layout.tp) // layout.tp
    logits = 5 * size * tokens * vocabulary  # read for the sum and the label, written and read as gradient
    sent = dp_seconds(cfg, layout, cluster, micro_steps)
    if layout.zero_stage == 3:  # overlap_comm is DeepSpeed's default there
        sent = max(0.0, sent - matmul - attention)
    hooks = TENSOR_S * (ZERO3_HOOKS if layout.zero_stage == 3 else 1.0)
    update, offload = _update(cfg, layout, gpu, micro_steps)
    return Step(
        matmul=matmul,
        attention=attention,
        elementwise=elementwise,
        loss=micro_steps * logits / _bytes_s(gpu),
        optimizer=update,
        host=micro_steps * hooks * tensors(model),
        offload=offload,
        tp_communication=micro_steps * tp_seconds(cfg, layout, cluster),
        dp_communication=sent,
    )


def one_graph(layout: Layout, gpu: Gpu) -> bool:
    """Whether torch.compile sees a block whole: engine.md, gpu.md's rows on megatron-core's linears and on ZeRO-3."""
    return gpu.name != CPU and layout.tp == 1 and layout.zero_stage < 3


def gemm_flops_s(m: int, k: int, n: int, gpu: Gpu, precision: Precision) -> float:
    """FLOP/s of an m x k by k x n product: short sides leave part of the device idle."""
    peak = (gpu.fp32_tflops if precision is Precision.fp32 else gpu.tflops) * 1e12
    return GEMM_SHARE * peak / (1 + GEMM_HALF / min(m, k, n))


def _matmul(cfg: PretrainConfig, layout: Layout, gpu: Gpu) -> float:
    """Of a micro step: 2 M K N FLOPs forward and twice that backward; full recompute runs a layer's forward again."""
    model, m = cfg.model, layout.micro_batch_size * cfg.model.n_ctx
    c, heads = model.n_embd, padded_n_head(model.n_head, layout.tp) * model.head_dim // layout.tp
    layer = [(c, 3 * heads), (heads, c), (c, 4 * c // layout.tp), (4 * c // layout.tp, c)]
    passes = 4 if layout.recompute is Recompute.full else 3
    head = (c, padded_vocab_size(model.vocab_size, layout.tp) // layout.tp)

    def seconds(k: int, n: int) -> float:
        return 2.0 * m * k * n / gemm_flops_s(m, k, n, gpu, cfg.precision)

    gain = FP8_SHARE * (gpu.fp8_tflops or gpu.tflops) / gpu.tflops if cfg.precision is Precision.fp8 else 1.0
    return model.n_layer * passes * sum(seconds(k, n) for k, n in layer) / gain + 3 * seconds(*head)


def _attention(cfg: PretrainConfig, layout: Layout, gpu: Gpu) -> float:
    """Of a micro step: 4 T² D FLOPs a head over the share of blocks that is visited, and 2.5 times that backward."""
    model = cfg.model
    heads = padded_n_head(model.n_head, layout.tp) // layout.tp
    whole = 4.0 * model.n_ctx**2 * model.head_dim * heads * layout.micro_batch_size
    passes = 4.5 if layout.recompute is Recompute.full else 3.5
    peak = (gpu.fp32_tflops if cfg.precision is Precision.fp32 else gpu.tflops) * 1e12
    whole_square = biased(cfg, gpu.name != CPU)
    seen = (1.0 if model.kind(i) in whole_square else visited(model, i) for i in range(model.n_layer))
    flops = whole * passes * sum(seen)
    return flops / (ATTENTION_SHARE * peak)


def _elementwise(cfg: PretrainConfig, layout: Layout, gpu: Gpu) -> float:
    """Of a micro step: LayerNorm, GELU, residual sums, biases' gradients, by the bytes that they move."""
    tokens = layout.micro_batch_size * cfg.model.n_ctx
    passes = [LAYER_FORWARD, LAYER_BACKWARD] + [LAYER_FORWARD] * (layout.recompute is not Recompute.none)
    share = layout.tp if layout.sequence_parallel else 1
    elements = sum(whole / share + split / layout.tp for whole, split in passes)
    moved = element_bytes(cfg) * tokens * cfg.model.n_layer * cfg.model.n_embd * elements
    if cfg.precision is Precision.fp8:  # inputs 7 C, outputs' gradients 9 C, the weights
        c = cfg.model.n_embd
        moved += FP8_ROUNDING * cfg.model.n_layer * (16 * tokens * c + 12 * c * c)
    return moved * (1.0 if one_graph(layout, gpu) else NOT_ONE_GRAPH) / _bytes_s(gpu)


def _update(cfg: PretrainConfig, layout: Layout, gpu: Gpu, micro_steps: int) -> tuple[float, float]:
    """(seconds on the device, seconds on the host and on the way there) of a step's gradients and update.

    bf16 ZeRO-1 (zero1.py): gradients are written in bf16 and copied to fp32, 8 bytes a parameter, in later micro steps
    added, 12; the update, on its part: norm 4, AdamW, which clips, 28, weights 6 bytes. DeepSpeed's own wrappers, the
    others: written, copied to fp32, added, 18 bytes; ZeRO-2 and 3 copy them into a bucket and back, 34; the update:
    norm 4, clipping 8, AdamW 28, weights 6, zeros 4 bytes.
    """
    p = local_params(cfg.model, layout.tp)
    if layout.zero_stage == 1 and layout.offload is Offload.none and element_bytes(cfg) == 2:
        return p * (12 * micro_steps - 4 + 38 / layout.dp) / _bytes_s(gpu), 0.0
    adding = micro_steps * p * (18 if layout.zero_stage == 1 else 34) / _bytes_s(gpu)
    if layout.offload is Offload.none:
        return adding + 50 * p / layout.dp / _bytes_s(gpu), 0.0
    sent = (4 * micro_steps + 2) * p / layout.dp + (4 * micro_steps * p if layout.zero_stage == 3 else 0)
    return adding, sent / (PCIE_GB_S * 1e9) + 50 * p / layout.dp / (HOST_GB_S * 1e9)


def _bytes_s(gpu: Gpu) -> float:
    return HBM_SHARE * gpu.hbm_gb_s * 1e9

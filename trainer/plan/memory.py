"""Bytes on one rank at the fullest moment of a step, part by part: docs/plan.md has each formula's source.

A step is fullest either when backward starts, with all activations and the logits, or when it ends, with all
gradients and the buffers that sum them over the ranks. test_plan_bytes.py counts those of the real engine.

Legend: P parameters on this rank before ZeRO, C n_embd, V vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from data_pipeline.files import GIB
from trainer.config.model import Norm
from trainer.config.optim import Kind
from trainer.config.parallel import Offload, Precision, Recompute
from trainer.model.arithmetic import LOSS_CHUNK_BYTES, REDUCE_BUCKET
from trainer.plan.attention_cost import biased
from trainer.plan.hardware import CPU, Gpu
from trainer.plan.layout import Layout, local_heads, local_params, local_vocab
from trainer.plan.workload import Workload

ZERO3_LIVE = 1_000_000_000  # elements of gathered weights (stage3_max_live_parameters, stage3_max_reuse_distance)
CHUNKS = 2.25  # of logits in fp32 at a time: p, the label as 0 or 1 in fp32, and its bool (trainer/model/loss.py)
FP8_KEPT, FP8_WEIGHTS = 27, 12  # bytes x C of a token, bytes x C^2 of a layer's rounded weights (docs/speed.md)
ALLOCATOR_SHARE = 0.04  # of all tensors: the caching allocator rounds blocks up and cuts them by reuse; an assumption
CPU_CONTEXT_GIB = 0.7  # interpreter and torch
CUDA_CONTEXT_GIB = 1.2  # CUDA with cuBLAS, cuDNN and NCCL, which torch's own figure does not hold; an assumption


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank's device. `host`: bytes in the CPU's memory, of offload and of the copy that checkpoints are
    written from."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float  # buffers of ZeRO, then the allocator's loss and the device's context
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")

    def gib(self) -> dict[str, float]:
        """Each part and the total, in GiB."""
        return {name: round(size / GIB, 3) for name, size in {**asdict(self), "total": self.total}.items()}


def memory(work: Workload, layout: Layout, gpu: Gpu) -> Memory:
    """All that a rank on `gpu` holds, the device's context and the allocator's loss included."""
    net = tensor_memory(work, layout, on_gpu=gpu.name != CPU)
    copy = snapshot(work, layout)
    if gpu.name == CPU:
        return replace(net, workspace=net.workspace + CPU_CONTEXT_GIB * GIB + copy)
    workspace = net.workspace + ALLOCATOR_SHARE * net.total + CUDA_CONTEXT_GIB * GIB
    return replace(net, workspace=workspace, host=net.host + copy)


def snapshot(work: Workload, layout: Layout) -> float:
    """Bytes of the copy that a checkpoint in the background is written from: masters and moments (snapshot.py)."""
    return optimizer_bytes(work, layout) / layout.dp if work.background else 0.0


def optimizer_bytes(work: Workload, layout: Layout) -> float:
    """Bytes of fp32 masters and moments before ZeRO: AdamW has two moments, of the blocks' matrices Muon one."""
    one_moment = 12 * work.model.n_layer * work.model.n_embd**2 if work.optimizer is Kind.muon else 0
    return 12.0 * local_params(work.model, layout.tp) - 4.0 * one_moment


def tensor_memory(work: Workload, layout: Layout, on_gpu: bool = True) -> Memory:
    """Bytes of the tensors alone, at the fullest moment."""
    p = local_params(work.model, layout.tp)
    accumulates = work.tokens_per_step > work.model.n_ctx * layout.micro_batch_size * layout.dp
    states = zero_states(p, layout, work.element_bytes, accumulates, optimizer_bytes(work, layout))
    kept, logits = activations(work, layout) + bias_bytes(work, layout, on_gpu), logit_bytes(work, layout)
    start = _backward_transients(work, layout)  # after the logits are gone
    if states.end > kept + max(logits, start) + states.bucket:  # backward's end: the activations are gone
        kept = logits = 0.0
        workspace = states.end
    else:
        workspace = states.bucket + max(0.0, start - logits)
    return Memory(states.weights, states.gradients, states.optimizer, kept, logits, workspace, states.host)


@dataclass(frozen=True)
class ZeroStates:
    """Bytes that ZeRO's wrapper holds: between steps, then its buffers when backward starts and when it ends."""

    weights: float
    gradients: float
    optimizer: float
    bucket: float
    end: float
    host: float = 0.0


def zero_states(p: int, layout: Layout, low: int, accumulates: bool, optimizer: float | None = None) -> ZeroStates:
    """DeepSpeed 0.19.8, as engine.py configures it: fp32 masters, fp32 sums of gradients, fp32 communication.

    16 bytes a parameter of masters, moments and fp32 gradients, and the weights that the model computes with. ZeRO-1
    splits masters and moments over dp, ZeRO-2 the sum of gradients too, ZeRO-3 the weights too. `low`: bytes of a
    weight. `accumulates`: a step has several micro steps, so a forward meets the sum of those before it. `optimizer`:
    bytes of masters and moments before ZeRO, if it is not AdamW's 12 a parameter.
    """
    dp, bucket = layout.dp, float(min(p, REDUCE_BUCKET))
    optimizer, share = (12.0 * p if optimizer is None else optimizer) / dp, 4.0 * p / dp
    gathered = low * min(p, ZERO3_LIVE)
    if layout.offload is Offload.cpu:
        host = optimizer + share + (low * p / dp if layout.zero_stage == 3 else 0.0)
        on_device = gathered if layout.zero_stage == 3 else low * p
        return ZeroStates(on_device, 0.0, 0.0, 4 * bucket, (8 + low) * bucket, host)
    if layout.zero_stage == 3:
        if dp == 1:  # nothing to gather, but the buffers are there
            return ZeroStates(low * p, share, optimizer, 4 * bucket, (8 + 2 * low) * bucket)
        return ZeroStates(low * p / dp + gathered, share, optimizer, 4 * bucket, (8 + low) * bucket)
    if layout.zero_stage == 1:
        # flat_zero1.py: fp32 sums of all gradients, summed over the ranks in place; the weights' own until backward's
        # end; in fp32 the masters are the weights
        moments = optimizer - share if low == 4 else optimizer
        return ZeroStates(low * p, 4.0 * p, moments, 0.0, float(low * p))
    held = share if accumulates else 0.0
    last = share - held if low == 2 else 0.0
    return ZeroStates(low * p, held, optimizer, 0.0, 8 * bucket + last)  # counted: no bucket while the logits are there


def activations(work: Workload, layout: Layout) -> float:
    """Bytes that autograd keeps for backward, of all layers of a micro batch, less those that are recomputed."""
    model, tokens = work.model, layout.micro_batch_size * work.model.n_ctx
    share = layout.tp if layout.sequence_parallel else 1
    ends = tokens * 2 * model.n_embd / share * work.element_bytes  # the last LayerNorm's input and output
    return model.n_layer * layer_bytes(work, layout, layout.recompute) + ends


def layer_bytes(work: Workload, layout: Layout, recompute: Recompute) -> float:
    """Bytes that autograd keeps of one layer.

    A layer keeps of each token, in elements: its input, both LayerNorms' outputs and the sum between (4 C, whole on
    each tp rank unless sequence parallelism splits them), q, k, v and attention's output (4 heads x D), the MLP before
    and after GELU (8 C): 16 C in all. Measured equal with and without torch.compile. fp8 keeps a linear's input in one
    byte, which leaves selective recompute nothing to save, and the rounded weights.
    """
    model, size = work.model, work.element_bytes
    tokens = layout.micro_batch_size * model.n_ctx
    share = layout.tp if layout.sequence_parallel else 1
    if recompute is Recompute.full:
        return tokens * model.n_embd / share * size
    heads = local_heads(model, layout.tp)
    statistics = 4 * heads  # log-sum-exp, fp32
    masks = 2 * model.n_embd / share if model.dropout > 0 else 0.0
    if work.precision is Precision.fp8:
        return tokens * (FP8_KEPT * model.n_embd + statistics + masks) + FP8_WEIGHTS * model.n_embd**2
    attention = 4 * heads * model.head_dim
    # GELU's output is made again and the LayerNorms', of post-norm only the first's: the last is the next's input
    whole, split = (4, 8) if recompute is Recompute.none else (2 if model.norm is Norm.pre else 3, 4)
    elements = whole * model.n_embd / share + attention + split * model.n_embd / layout.tp
    return tokens * (elements * size + statistics + masks)


def bias_bytes(work: Workload, layout: Layout, on_gpu: bool) -> float:
    """Bytes of attention's biases, one for all layers of a letter: [T, T], with documents [B, 1, T, T]."""
    rows = layout.micro_batch_size if work.document_mask else 1
    return float(len(biased(work.model, work.document_mask, on_gpu)) * rows * work.model.n_ctx**2 * work.element_bytes)


def logit_bytes(work: Workload, layout: Layout) -> float:
    """Bytes of the logits and of the loss, whose gradient takes their place."""
    logits = layout.micro_batch_size * work.model.n_ctx * local_vocab(work.model, layout.tp)
    size = work.element_bytes
    return float(size * logits + CHUNKS * min(LOSS_CHUNK_BYTES, 4 * logits))


def _backward_transients(work: Workload, layout: Layout) -> float:
    """Bytes beside those that forward kept: gradients of the embedding and inside a layer, recomputed activations."""
    model, size = work.model, work.element_bytes
    tokens = layout.micro_batch_size * model.n_ctx
    vocabulary = local_vocab(model, layout.tp)
    again = 0.0
    if layout.recompute is not Recompute.none:
        kept = 0.0 if layout.recompute is Recompute.full else layer_bytes(work, layout, layout.recompute)
        again = layer_bytes(work, layout, Recompute.none) - kept
    return again + size * (vocabulary * model.n_embd + tokens * (2 * model.n_embd + 8 * model.n_embd / layout.tp))

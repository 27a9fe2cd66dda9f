"""megatron-core's tensor-parallel layers as this model uses them: the door to them.

At tp = 1 a layer is plain `F.linear`, so that torch.compile sees one graph. Weights are left empty for `init.py`.

Legend: T time (under sequence parallelism: this rank's part of it), B batch, C n_embd, V vocabulary on this rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.distributed.mesh import Mesh
from trainer.model.arithmetic import LOSS_CHUNK_BYTES, padded_vocab_size

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig, tensor_parallel
    from megatron.core.tensor_parallel import linear_with_grad_accumulation_and_async_allreduce as parallel_linear


def _config(mesh: Mesh, sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,  # allocate on torch's current default device, not on "cuda"
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def _split(param: nn.Parameter, dim: int) -> None:
    """Mark a parameter of which each tp rank holds a part: DeepSpeed's norm then counts every part."""
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    param.partition_dim = dim  # type: ignore[attr-defined]


class _Plain(nn.Module):
    """Takes back the `_extra_state: None` that megatron-core's layers put into a state dict for Transformer Engine."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` as it is when it is called: ZeRO-3 puts one there that does not keep the gathered weight."""
    return F.linear(x, weight, bias)


class ColumnLinear(_Plain, tensor_parallel.ColumnParallelLinear):
    """y = x Aᵀ + b, A [out, in]: each rank holds out / tp outputs. [T, B, in] -> [T, B, out / tp], T whole again."""

    weight: nn.Parameter
    bias: nn.Parameter
    sequence_parallel: bool

    def __init__(self, n_in: int, n_out: int, mesh: Mesh, sequence_parallel: bool) -> None:
        config = _config(mesh, sequence_parallel)
        super().__init__(n_in, n_out, config=config, init_method=None, bias=True, tp_group=mesh.tp_group)
        self.tp = mesh.tp
        self.product: Product = product  # of tp = 1; fp8.py has another
        _split(self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias) if self.tp == 1 else super().forward(x)[0]


class RowLinear(_Plain, tensor_parallel.RowParallelLinear):
    """y = x Aᵀ + b, A [out, in]: each rank holds in / tp inputs. [T, B, in / tp] -> [T, B, out], summed over them."""

    weight: nn.Parameter
    bias: nn.Parameter
    sequence_parallel: bool

    def __init__(self, n_in: int, n_out: int, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__(
            n_in,
            n_out,
            config=_config(mesh, sequence_parallel),
            init_method=None,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=mesh.tp_group,
        )
        self.tp = mesh.tp
        self.product: Product = product  # of tp = 1; fp8.py has another
        _split(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias) if self.tp == 1 else super().forward(x)[0]


class TiedEmbedding(_Plain, tensor_parallel.VocabParallelEmbedding):
    """The token embedding, and with `head=True` the output layer on the same weight [V, C].

    One module for both, so that ZeRO-3's hooks gather the weight for either use.
    """

    weight: nn.Parameter
    vocab_start_index: int
    num_embeddings_per_partition: int
    reduce_scatter_embeddings: bool

    def __init__(self, vocab_size: int, n_embd: int, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__(
            padded_vocab_size(vocab_size, mesh.tp),
            n_embd,
            init_method=None,
            reduce_scatter_embeddings=sequence_parallel,
            config=_config(mesh, sequence_parallel),
            tp_group=mesh.tp_group,
        )
        self.tp = mesh.tp
        self.n_true = min(max(vocab_size - self.vocab_start_index, 0), self.num_embeddings_per_partition)
        _split(self.weight, 0)

    def forward(self, x: Tensor, head: bool = False, reduce: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
        """Tokens [B, T] -> x_TBC; with `head` x_TBC -> logits_TBV, -inf where no token is.

        With `reduce` x_NC -> the results of `reduce(logits_nV, first row)` for each chunk of rows, one after the other:
        no more logits than a chunk's are held, and ZeRO-3 gathers the weight once for all of them.
        """
        if reduce is not None:
            rows = max(1, LOSS_CHUNK_BYTES // (4 * self.weight.shape[0]))
            return torch.cat([reduce(self._logits(part), i * rows) for i, part in enumerate(x.split(rows))])
        if head:
            return self._logits(x)
        if self.tp == 1:
            return F.embedding(x.t(), self.weight)
        if self.reduce_scatter_embeddings:  # then megatron-core transposes by itself
            return super().forward(x)
        return super().forward(x.t())

    def _logits(self, x_TBC: Tensor) -> Tensor:
        if self.tp == 1:
            logits_TBV = F.linear(x_TBC, self.weight)
        else:
            split = self.reduce_scatter_embeddings
            logits_TBV = parallel_linear(
                x_TBC,
                self.weight,
                None,
                False,
                allreduce_dgrad=not split,
                sequence_parallel=split,
                tp_group=self.tp_group,
            )
        if self.n_true < logits_TBV.shape[-1]:
            with torch.no_grad():  # p = 0 there, hence the gradient is 0 as it is: nothing for autograd to see
                logits_TBV[..., self.n_true :] = -torch.inf
        return logits_TBV


def split_sequence(model: nn.Module, split: bool) -> None:
    """Set whether each tp rank holds a part of the sequence, or all of it, between the linears of `model`."""
    for module in model.modules():
        if isinstance(module, (ColumnLinear, RowLinear)):
            module.sequence_parallel = split
        elif isinstance(module, TiedEmbedding):
            module.reduce_scatter_embeddings = split


def gather_vocab(logits_TBV: Tensor, mesh: Mesh) -> Tensor:
    """The parts of all tp ranks side by side, in vocabulary order."""
    if mesh.tp == 1:
        return logits_TBV
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits_TBV, group=mesh.tp_group)
